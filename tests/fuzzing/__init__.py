"""A fuzz harness for everything that pyrodiff reads: valid files, changed, read in a forked child.

``targets`` says what is read and what makes an outcome right, ``mutations`` how files are changed,
``worker`` runs one case under limits of time and memory and says how it ended.
"""

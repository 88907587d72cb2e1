"""The page that reports a comparison of runs: one file that can be sent.

The page needs nothing from elsewhere (it contains its style and pictures, and its policy forbids
any request), runs no script, and can be printed or read on a telephone.  Names are escaped.
"""

import base64
import contextlib
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template

from pyrodiff import serialization
from pyrodiff.comparison import Difference
from pyrodiff.runs.build import load_model
from pyrodiff.runs.pictures import samples_png
from pyrodiff.runs.report.figures import Figure, draw_figures
from pyrodiff.runs.report.folder import GENERATOR, settle_files, value_name
from pyrodiff.runs.report.text import Report, Table, facts, reading, tables, words

__all__ = ["write_report"]


def write_report(report: Report, path: Path) -> Path:
    """Write the page, and beside it the folder of figures and values; returns the page's path.

    The caller has locked the folder and claimed the names (``report.folder``).
    """
    figures, folder = draw_figures(report.comparison, report.first), path.with_suffix("")
    page = _page(report, figures).encode()
    names = [f"{figure.name}.png" for figure in figures]
    for name, figure in zip(names, figures, strict=True):
        serialization.write_bytes(folder / name, figure.png)
    if not report.settings.saved:
        names += _save_values(report, folder)
    settle_files(folder, names)
    serialization.write_bytes(path, page)
    return path


def _save_values(report: Report, folder: Path) -> list[str]:
    """Save every evaluation in a file of its own; returns their names."""
    attributes, names = {"data": report.dataset.name, "split": report.evaluation.split}, []
    for number, (name, results) in enumerate(zip(report.names, report.results, strict=True), 1):
        for repeat, (result, seed) in enumerate(zip(results, report.noise, strict=True), 1):
            names.append(value_name(number, name, repeat, len(results)))
            result.save(folder / names[-1], **attributes, seed=seed, run=name)
    return names


def _page(report: Report, figures: Sequence[Figure]) -> str:
    comparison = report.comparison
    *others, last = comparison.models
    names = " and ".join([", ".join(others), last])
    title = f"{names} on {report.dataset.name}"
    return _PAGE.substitute(
        title=html.escape(title),
        generator=GENERATOR,
        style=_STYLE,
        lead=html.escape(
            f"{comparison.samples} held-out samples ({report.evaluation.split} split), the same "
            f"for all models. Best by its mean: {comparison.reference}."
        ),
        verdicts="".join(_verdict(difference, report) for difference in comparison.differences),
        tables="".join(map(_html_table, tables(report))),
        notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in comparison.notes),
        figures="".join(map(_html_figure, figures)),
        samples="".join(map(_html_figure, _samples(report))),
        reading="".join(f"<p>{html.escape(line)}</p>" for line in reading(report)),
        facts="".join(
            f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>"
            for key, value in facts(report)
        ),
    )


def _verdict(difference: Difference, report: Report) -> str:
    measured, verdict = (html.escape(line) for line in words(difference, report))
    kind = difference.status.replace(" ", "-")
    return (
        f'<div class="verdict {html.escape(kind)}"><p>{measured}</p>'
        f"<p><strong>log p:</strong> {verdict}</p></div>"
    )


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = []
    for first, *others in table.rows:
        cells = "".join(
            f'<td data-label="{html.escape(name)}">{html.escape(value)}</td>'
            for name, value in zip(table.header[1:], others, strict=True)
        )
        rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return (
        f"<table><caption>{html.escape(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _html_figure(figure: Figure) -> str:
    source = base64.b64encode(figure.png).decode()
    caption = html.escape(figure.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{source}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _samples(report: Report) -> list[Figure]:
    """Samples of each model's first run, of one seed and number for all; none without weights."""
    data, seed = report.dataset, report.evaluation.seed
    count, context = 16 if data.is_image else 256, None
    if data.test_context is not None:
        context = data.test_context[:count]
        count = len(context)
    runs = {model.name: report.runs[model.runs[0]] for model in report.models}
    figures = []
    for name in report.comparison.models:
        with contextlib.suppress(FileNotFoundError):  # saved values may stand alone
            reverse = load_model(Path(runs[name]))
            x = reverse.sample(count, seed=seed, context=context)
            text = f"{count} samples of {name}, from seed {seed}."
            figures.append(Figure("samples", text, samples_png(x, data.levels is not None)))
    return figures


_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 54rem; color: var(--ink);
  background: #fff; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.lead, figcaption, .note { color: var(--soft); }
.note, figcaption { font-size: .9rem; }
.verdict { border-left: .3rem solid #59636e; background: #f6f8fa; margin: .8rem 0;
  padding: .6rem .9rem; }
.verdict p { margin: .2rem 0; }
.verdict.decided { border-color: #009e73; }
.verdict.likely { border-color: #0072b2; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 1.5rem;
  font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  overflow-wrap: normal; }
td { white-space: nowrap; }
th:first-child { text-align: left; overflow-wrap: anywhere; min-width: 6rem; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
figure { margin: 1.5rem 0; max-width: 46rem; break-inside: avoid; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.samples figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1rem;
  font-size: .92rem; }
dt { color: var(--soft); max-width: 14rem; } dd { margin: 0; }
@media (max-width: 40rem) {
  table, tbody, tr, th, td, caption { display: block; }
  thead { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; }
  tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  th, td { border: 0; padding: .1rem 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; }
  td::before { content: attr(data-label); color: var(--soft); text-align: left; }
  dl { display: block; } dd { margin-bottom: .5rem; }
}
@page { size: A4; margin: 16mm 15mm; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  .verdict, tr, figure { break-inside: avoid; } }
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
$generator
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<p class="lead">$lead</p>
$verdicts
<h2>Numbers</h2>
$tables
$notes
<h2>Figures</h2>
$figures
<div class="samples">$samples</div>
<h2>How to read this</h2>
$reading
<h2>Where it comes from</h2>
<dl>$facts</dl>
</body>
</html>
""")

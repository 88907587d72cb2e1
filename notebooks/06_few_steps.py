# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How many steps does a bound need?
#
# A diffusion model is usually evaluated with the thousand steps that it was trained with, so that
# one path of its bound takes a thousand network calls. That number is a habit. A reverse step is
# Gaussian and the true one is not, and the longer a step, the more it matters *which* Gaussian. This
# notebook changes two things, the covariance of the step and the levels that the steps visit: on a
# mixture whose $\log p$ is known, and on digits, with one network that is trained once.
#
# Terms: a *call* is a row of input to the network or a product with its Jacobian, which is a
# backward pass and takes about as long. Every figure after ± is a standard error over samples; bars
# show two of them. Differences are paired sample by sample.
#
# (The full mode takes about six minutes on one core.)

# %%
# %matplotlib inline
import math
import os
import warnings

import pandas as pd
import torch
from matplotlib.figure import Figure

from pyrodiff import (
    DDIM,
    AnalyticVariance,
    CategoricalDecoder,
    DataDenoiser,
    FixedSmall,
    ForwardChain,
    GaussianDecoder,
    ImportanceBound,
    LogSNRSchedule,
    NoiseDenoiser,
    OptimalGrid,
    PathBound,
    Pilot,
    PosteriorCovariance,
    ProbabilityFlowSampler,
    ResidualConvNet,
    ReverseChain,
    TermwiseBound,
    VariationalBound,
    data,
    plots,
)
from pyrodiff.kernels import marginal_coefficients
from pyrodiff.oracles import GaussianMixture
from pyrodiff.plots.style import plain_ticks, plus_minus, style

QUICK = os.environ.get("PYRODIFF_QUICK") == "1"  # fewer samples and steps, the same lesson
torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=FutureWarning)  # ArviZ, of its own next version


def with_error(values):
    """The mean of values for each sample and its standard error."""
    return plus_minus(float(values.mean()), float(values.std()) / len(values) ** 0.5)


# %% [markdown]
# ## 1. A covariance for nothing
#
# The step that the model should imitate has the first two moments
#
# $$\mathbb E[x_s \mid x_t] = c_0\, \mathbb E[x_0 \mid x_t] + c_t x_t, \qquad
#   \operatorname{Cov}[x_s \mid x_t] = \tilde\beta_t I + c_0^2 \operatorname{Cov}[x_0 \mid x_t]$$
#
# ([notebook 04](04_learned_variance.ipynb), equation 1). A denoiser is the first expectation, and
# its slope is the last covariance (Tweedie's formula, once differentiated; Efron, 2011; Meng et al.,
# 2021):
#
# $$V(x_t) = \operatorname{Cov}[x_0 \mid x_t]
#   = \frac{\sigma_t^2}{\alpha_t}\, \frac{\partial \hat x_0}{\partial x_t}.$$
#
# So a model that was trained to predict a mean knows its covariance too. `PosteriorCovariance` puts
# it in the reverse step: all of it (`"full"`, $d$ products), its diagonal, a few directions beside
# the diagonal (`rank`), or its trace (`"isotropic"`); diagonal and trace also from a few random
# probes (Hutchinson, 1990), which are fixed for each step so that the step has a density. Beside
# these stand *fixed small*, $\tilde\beta_t$ alone, and the *analytic* variance, the best function
# of $t$ (Bao et al., 2022).
#
# The mixture has 25 elongated components in 8 dimensions. Its denoiser is exact, so the gap between
# $\log p$ and the ELBO is due to the steps and to nothing else.

# %%
SIZE, COMPONENTS = 8, 25
generator = torch.Generator().manual_seed(0)
means = 0.9 * torch.randn(COMPONENTS, SIZE, generator=generator, dtype=torch.float64)
turns = torch.randn(COMPONENTS, SIZE, SIZE, generator=generator, dtype=torch.float64)
turns = torch.linalg.qr(turns).Q
scales = torch.tensor([0.5, 0.3, 0.2, 0.15, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
covariances = turns @ torch.diag(scales.square()) @ turns.mT
law = GaussianMixture(torch.ones(COMPONENTS) / COMPONENTS, means, covariances)

forward = ForwardChain(LogSNRSchedule(8.0, -7.0), num_steps=1000)
decoder = GaussianDecoder(scale=math.exp(-4.0))  # σ_1/α_1: the ends are the same for all variances
mixture = ReverseChain(
    NoiseDenoiser(law.network()), forward, event_shape=(SIZE,), decoder=decoder
).eval()
x, other = law.sample(64 if QUICK else 256, seed=1), law.sample(1000, seed=2)

variances = {
    "fixed small": FixedSmall(),
    "analytic": AnalyticVariance.fit(mixture, other),
    "isotropic": PosteriorCovariance("isotropic"),
    "diagonal": PosteriorCovariance("diagonal"),
    "rank 2 + diagonal": PosteriorCovariance("diagonal", rank=2),
    "full": PosteriorCovariance("full"),
}

# %% [markdown]
# But for the two ends, that is. $q(x_T)$ is not quite $\mathcal N(0, I)$, and the decoder is not
# quite $q(x_0 \mid x_1)$; no number of steps between $x_1$ and $x_T$ changes either. Both are known
# here,
#
# $$\mathbb E \log \frac{q(x_T)}{p(x_T)} + \mathbb E \log
#   \frac{q(x_0 \mid x_1)}{p_\theta(x_0 \mid x_1)},$$
#
# and are taken out of all gaps below.


# %%
def noised(x_0, log_snr, seed):
    """x_t, and log q(x_t | x_0) − log q(x_t) under the mixture."""
    alpha, sigma = marginal_coefficients(log_snr)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    x_t = alpha * x_0 + sigma * noise
    kernel = torch.distributions.Normal(alpha * x_0, sigma).log_prob(x_t).sum(1)
    return x_t, kernel - law.noised(log_snr).log_prob(x_t)


def loss_at_the_ends(x_0):
    """log q(x_T)/p(x_T) + log q(x_0 | x_1)/p(x_0 | x_1) for each sample, nats."""
    x_1, information = noised(x_0, forward.log_snr[0], seed=4)
    first = law.log_prob(x_0) + information - mixture.decode(x_1).log_prob(x_0)
    x_T, _ = noised(x_0, forward.log_snr[-1], seed=5)
    marginal = law.noised(forward.log_snr[-1]).log_prob(x_T)
    return first + marginal - mixture.prior(x_T).log_prob(x_T)


floor = loss_at_the_ends(law.sample(20_000, seed=3))
print("the ends:", with_error(floor), "nats")

# %%
lengths = [10, 25] if QUICK else [10, 25, 50, 100, 200]
gaps, calls = {}, {}  # nats, (lengths, samples); network calls of one path
for name, variance in variances.items():
    chains = [mixture.respaced(n, variance=variance) for n in lengths]
    values = [PathBound(particles=2).estimate(few, x, seed=0).value for few in chains]
    gaps[name] = law.log_prob(x) - torch.stack(values) - floor.mean()
    calls[name] = [few.calls_per_path for few in chains]


def slope(gap):
    """d log gap / d log T without T = 10, by weighted least squares, and its jackknife error."""
    kept = slice(0 if QUICK else 1, None)
    log_n = torch.tensor(lengths[kept], dtype=torch.float64).log()
    weight = (gap[kept].mean(1) / gap[kept].std(1)).square()  # one over the variance of the log
    log_n -= (weight * log_n).sum() / weight.sum()

    def fitted(mean):
        return float((weight * log_n * mean[kept].log()).sum() / (weight * log_n**2).sum())

    blocks = gap.unflatten(1, (16, -1)).mean(2)
    left_out = [fitted((blocks.sum(1) - blocks[:, i]) / 15) for i in range(16)]
    spread = torch.tensor(left_out).var(unbiased=False)
    return fitted(gap.mean(1)), float((15 * spread).sqrt())


# %%
figure = Figure(figsize=(9.5, 4.2), layout="constrained")
left, right = figure.subplots(1, 2, sharey=True)
for i, (name, gap) in enumerate(gaps.items()):
    mean, error = gap.mean(1), gap.std(1) / gap.shape[1] ** 0.5
    look = style(i)._asdict()
    left.errorbar(lengths, mean, 2 * error, capsize=2.5, label=name, **look)
    right.errorbar(calls[name], mean, 2 * error, capsize=2.5, **look)
left.set(xlabel="steps T", ylabel="log p − ELBO, without the ends (nats)")
right.set(xlabel="network calls of a path, products counted")
for panel in (left, right):
    panel.set(xscale="log", yscale="log")
    plain_ticks(panel.xaxis)
    plain_ticks(panel.yaxis)
    panel.grid(alpha=0.25)
left.set_xticks(lengths, [str(n) for n in lengths])
figure.legend(frameon=False, loc="outside upper center", ncols=6)
figure

# %%
table = {
    name: [with_error(row) for row in gap]
    + [" ± ".join(f"{v:.2f}" for v in slope(gap)).replace("-", "−")]
    for name, gap in gaps.items()
}
columns = [*(f"T = {n}" for n in lengths), "slope"]
pd.DataFrame(table, index=columns).T.rename_axis("nats")

# %% [markdown]
# - **Every covariance but the full one has a slope near −1**: it misses a part of the
#   second moment that is proportional to the length of the step; a KL is the square of that; and
#   there are $T$ such steps. What is kept of $V$ lowers the line but does not tilt it.
# - **The full one falls faster**, −1.73 ± 0.24. The second moments are right, and what is left is
#   the skewness of a step, for which the same count gives −2. At $T = 25$ it has 0.31 ± 0.03 nats,
#   a third of the isotropic one's, at $T = 100$ a sixth.
# - **In calls it is another picture.** Eight products for each step make the full covariance nine
#   times as dear. The analytic variance has no products, and nothing is better for a few hundred
#   calls; its line, extended, meets that of the full one near 900 calls and 0.03 nats, and beyond
#   that the slope decides. A diagonal that takes as many products as all of $V$ is a bad bargain: in
#   few dimensions take all or nothing; probes and directions are for many.
#
# ## 2. Digits
#
# The network of [notebook 03](03_likelihood_bounds.ipynb), trained on a chain of 1000 steps. What
# follows changes the chain and never the network. The grids are those of section 3, each fitted on
# validation images with the variance in use.

# %%
digits = data.load("digits")
torch.manual_seed(0)
network = ResidualConvNet(
    digits.event_shape, channels=24, blocks=3, levels=17, fourier=(), dropout=0.1
)
chain = ForwardChain(LogSNRSchedule(7.5, -6.0), num_steps=1000)
long = ReverseChain(
    DataDenoiser(network), chain, digits.event_shape, FixedSmall(), CategoricalDecoder(17)
)

steps = 60 if QUICK else 1500
elbo = VariationalBound()(long, chain)  # an nn.Module: any torch optimizer will do
optimizer = torch.optim.AdamW(long.parameters(), weight_decay=0.1)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
for _ in range(steps):
    batch = digits.train[torch.randint(len(digits.train), (64,))]
    optimizer.zero_grad()
    (elbo(batch) / len(batch)).backward()
    torch.nn.utils.clip_grad_norm_(long.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
long = long.eval()

# %%
test = digits.test[:4] if QUICK else digits.test[:64]
held_out = digits.validation[:4] if QUICK else digits.validation[:64]
unit = digits.dimensions * math.log(2)
whole = PathBound(particles=1).estimate(long, test, seed=0)
spent = round(whole.network_evaluations)
print(f"T = 1000: {with_error(-whole.value / unit)} bits/dim, {spent} calls")

# %%
kinds = {
    "fixed small": FixedSmall(),
    "isotropic, 1 probe": PosteriorCovariance("isotropic", probes=1),
    "diagonal, 1 probe": PosteriorCovariance("diagonal", probes=1),
    "rank 1 + diagonal, 2 probes": PosteriorCovariance("diagonal", rank=1, probes=2),
    "full": PosteriorCovariance("full"),
}


def best_grid(variance):
    """Levels of least cost for a variance, on validation images."""
    images = held_out[:32] if variance.products(digits.dimensions) > 10 else held_out
    coarse = long.respaced(2, variance=variance)  # the ends, and the variance in use
    return OptimalGrid.fit(coarse, images, candidates=12 if QUICK else 60)


grids = {name: best_grid(variance) for name, variance in kinds.items()}

# %%
counts = [5, 10] if QUICK else [10, 25, 50]
paths = {
    (name, n): PathBound(particles=1).estimate(
        long.respaced(n, variance=variance, grid=grids[name]), test, seed=0
    )
    for name, variance in kinds.items()
    for n in counts
}


def worse(result, than=whole):
    """Bits per dimension by which a bound is worse than another, sample by sample."""
    return (than.value - result.value) / unit


# %%
figure = Figure(figsize=(7.5, 4.0), layout="constrained")
panel = figure.subplots()
for i, name in enumerate(kinds):
    held = [paths[name, n] for n in counts]
    bits = [float(-one.value.mean()) / unit for one in held]
    errors = [2 * float(worse(one).std()) / len(test) ** 0.5 for one in held]
    spent = [one.network_evaluations for one in held]
    panel.errorbar(spent, bits, errors, capsize=2.5, label=name, **style(i)._asdict())
level = float(-whole.value.mean()) / unit
panel.axhline(level, color="black", linewidth=1)
panel.plot(1000, level, "*", color="black", markersize=11, label="T = 1000, fixed small")
panel.set(xscale="log", xlabel="network calls of a path, products counted", ylabel="bits/dim")
plain_ticks(panel.xaxis)
panel.grid(alpha=0.25)
panel.legend(frameon=False)
figure


# %%
def figures(result):
    return f"{with_error(worse(result))} ({round(result.network_evaluations)})"


rows = {name: {f"T = {n}": figures(paths[name, n]) for n in counts} for name in kinds}
pd.DataFrame(rows).T.rename_axis("bits/dim above T = 1000 (calls)")

# %% [markdown]
# - **A tenth of the calls for nearly the same bound.** With one probe, 50 steps have 100 calls and
#   stand 0.012 ± 0.010 bits/dim above the 1000 steps; 25 steps are 0.068 ± 0.010 above. The small
#   variance has 0.178 ± 0.016 with 50 steps.
# - **What matters is that pixels differ.** The trace alone, from the same probe at the same price,
#   leaves 0.20 at 25 steps where the diagonal leaves 0.07. Some pixels are black in every image,
#   others uncertain until late.
# - **The full covariance** needs the fewest steps: 25 are level with 1000 (0.012 ± 0.008), 50 are too
#   (−0.009 ± 0.008). But with 64 products a step it is no saving here: it is the limit that the
#   cheaper ones approach. A direction and a second probe gain 0.027 on the diagonal at 25 steps.
#
# ## 3. The grid
#
# The bound is a sum over steps, and the cost of a step from $\lambda_t$ to $\lambda_s$, the mean of
# $\mathrm{KL}(q(x_s \mid x_t, x_0) \,\|\, p_\theta(x_s \mid x_t))$, does not depend on the other
# steps. `OptimalGrid.fit` measures it for all pairs of 60 levels, and dynamic programming finds the
# $T$ levels of least sum, for any $T$ (Watson et al., 2021). It matters that the cost is that of the
# variance in use, with each image's own covariance: the mean of a logarithm is not the logarithm of
# a mean.
#
# Most of a step's cost is not lost: finer steps between the same two levels would pay it too. Above,
# what is lost, the cost of a step of length 0.7 less that of the three fine steps it replaces, per
# unit of $\lambda$. Below, the levels of 25 steps.


# %%
def lost(grid, span):
    """λ in the middle of steps over ``span`` candidates, and what one loses, in nats per unit λ."""
    fine = grid.costs.diagonal(-1)  # from candidate i + 1 to candidate i
    points, losses = [], []
    for i in range(span + 1, len(grid.candidates)):
        length = grid.candidates[i - span] - grid.candidates[i]
        points.append((grid.candidates[i - span] + grid.candidates[i]) / 2)
        losses.append((grid.costs[i, i - span] - fine[i - span : i].sum()) / length)
    return torch.stack(points), torch.stack(losses)


shown = ["fixed small", "diagonal, 1 probe", "full"]
count = counts[-2]
figure = Figure(figsize=(9.0, 5.0), layout="constrained")
top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.8, 1])
for name in shown:
    look = style(list(kinds).index(name))
    at, loss = lost(grids[name], 2 if QUICK else 3)
    top.plot(at, loss, color=look.color, linestyle=look.linestyle, label=name)
top.set_ylabel("loss of a step\n(nats per unit λ)")
top.legend(frameon=False)
levels = {"even": long.respaced(count).log_snrs}
levels |= {name: grids[name].log_snrs(long.log_snrs, count) for name in shown}
for row, (name, log_snrs) in enumerate(levels.items()):
    color = style(list(kinds).index(name)).color if row else "black"
    bottom.plot(log_snrs, [-row] * count, "|", color=color, markersize=13, markeredgewidth=1.5)
bottom.set_yticks([-row for row in range(len(levels))], list(levels))
bottom.set(xlabel="log-SNR λ (left: data, right: noise)", ylim=(-len(levels) + 0.4, 0.6))
bottom.invert_xaxis()
for panel in (top, bottom):
    panel.grid(alpha=0.25, axis="x")
figure

# %%
rows = {}
for name in shown[:2]:
    for n in counts:
        even = PathBound(particles=1).estimate(long.respaced(n, variance=kinds[name]), test, seed=0)
        best = paths[name, n]
        rows[name, n] = {
            "even": with_error(-even.value / unit),
            "optimal": with_error(-best.value / unit),
            "gain": with_error(worse(even, best)),
        }
pd.DataFrame(rows).T.rename_axis(["bits/dim", "T"])

# %% [markdown]
# - **Where steps are lost.** The small variance loses most near the data, where each step misses a
#   part of the covariance, and so that is where its levels are. With the diagonal little is left to
#   lose, except in the last steps before the data and around $\lambda = 1$. There the full covariance
#   loses a third as much: it is the dependence between pixels that a diagonal misses. Below $\lambda
#   = -2$ no variance loses anything, and an even grid spends nearly a third of its steps.
# - **A grid is worth the more, the worse the variance**: 1.10 ± 0.06 bits/dim for the small one at 10
#   steps, 0.13 ± 0.02 for the diagonal; at 50 steps 0.046 ± 0.006, and nothing beyond the error.
# - The costs are means over a few dozen images, and a search among noisy costs would prefer levels
#   whose noise is favourable. So every level sees the same images with the same noise.
#
# ## 4. What is clipped, and what calibration gains
#
# The Jacobian of a trained network is not a covariance: it is not symmetric, and not positive. The
# library takes the symmetric part and sets to 0 what is negative: eigenvalues for `"full"`, entries of
# the estimated diagonal otherwise. `clipped` counts. What is left may still be too wide or too
# narrow; `fit` finds, on validation images, a scale $a$ by noise level with the least mean KL (and,
# where there are directions, a weight between $V$ and its diagonal).

# %%
probe = kinds["diagonal, 1 probe"]
calibrated = probe.fit(long, held_out)
rows = {}
for n in counts:
    few = long.respaced(n, variance=calibrated, grid=grids["diagonal, 1 probe"])
    result = PathBound(particles=1).estimate(few, test, seed=0)
    rows[f"T = {n}"] = {
        "calibrated": with_error(-result.value / unit),
        "gain": with_error(worse(paths["diagonal, 1 probe", n], result)),
    }
pd.DataFrame(rows).T.rename_axis("bits/dim")

# %%
figure = Figure(figsize=(9.5, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
for name, variance, images in (
    ("diagonal, 1 probe", probe, held_out),
    ("full", kinds["full"], held_out[:16]),
):
    look = style(list(kinds).index(name))
    at, share = variance.clipped(long, images, knots=5 if QUICK else 25)
    left.plot(at, share, color=look.color, linestyle=look.linestyle, label=name)
left.set(ylabel="share of V set to 0", ylim=(0, None))
left.legend(frameon=False)
look = style(list(kinds).index("diagonal, 1 probe"))
right.plot(calibrated.log_snrs, calibrated.scales, color=look.color, label="diagonal, 1 probe")
right.axhline(1, color="black", linewidth=1)
right.set(ylabel="fitted scale a", ylim=(0, None))
for panel in (left, right):
    panel.set_xlabel("log-SNR λ (left: data, right: noise)")
    panel.invert_xaxis()
    panel.grid(alpha=0.25)
figure

# %% [markdown]
# - **About a quarter of the eigenvalues is negative**: 4 per cent at $\lambda = 6$, half at the noisy
#   end, where an error of the slope is multiplied by $\sigma_t^2/\alpha_t$, and two fifths at the
#   very end towards the data, where $V$ is nearly 0.
# - **The scale is near 1 where it matters** and falls with the noise. A single probe, clipped at 0, is
#   too large on average, since only its negative errors are cut off.
# - **The gain is small and sure**: 0.026 ± 0.005 bits/dim at 10 steps, 0.007 ± 0.002 at 25, 0.002 ±
#   0.002 at 50, for no calls at all once it is fitted.
#
# ## 5. Samples
#
# Four samplers on the same levels, with the same seed, and so from the same $x_T$: ancestral
# sampling with the small variance and with the diagonal of one probe; DDIM without noise (Song et
# al., 2021); and Heun's method for the probability flow (Karras et al., 2022). The last two take the
# denoiser's mean and no variance.


# %%
def energy_distance(x, y):
    """That of samples x and y, unbiased, and its standard error over x."""
    x, y = x.flatten(1).double(), y.flatten(1).double()

    def to_others(z):
        return torch.cdist(z, z).sum(1) / (len(z) - 1)

    across, among = torch.cdist(x, y).mean(1), to_others(x)
    value = 2 * across.mean() - among.mean() - to_others(y).mean()
    return plus_minus(float(value), float(2 * (across - among).std()) / len(x) ** 0.5)


draws = 16 if QUICK else 256
drawn = {}
for n in counts:
    small, wide = (
        long.respaced(n, variance=kinds[name], grid=grids["diagonal, 1 probe"])
        for name in ("fixed small", "diagonal, 1 probe")
    )
    drawn["ancestral, fixed small", n] = small.sample(draws, seed=1)
    drawn["ancestral, diagonal", n] = wide.sample(draws, seed=1)
    drawn["DDIM", n] = DDIM().sample(small, draws, seed=1)
    drawn["Heun", n] = ProbabilityFlowSampler().sample(small, draws, seed=1)
slow = long.sample(16 if QUICK else 192, seed=1)

# %%
samplers = list(dict.fromkeys(name for name, _ in drawn))
figure = Figure(figsize=(9.5, 2.5 * len(counts)), layout="constrained")
for row, n in zip(figure.subplots(len(counts), 4), counts, strict=True):
    for panel, name in zip(row, samplers, strict=True):
        plots.samples_grid(drawn[name, n][:16], axes=panel)
        panel.set_title(f"{name}, T = {n}", fontsize=10)
figure

# %%
per_step = {"ancestral, fixed small": 1, "ancestral, diagonal": 2, "DDIM": 1, "Heun": 2}
rows = {
    f"{name}, {per_step[name]} per step": {
        f"T = {n}": energy_distance(drawn[name, n], digits.test) for n in counts
    }
    for name in samplers
}
print("T = 1000, ancestral, fixed small:", energy_distance(slow, digits.test))
print("training images:", energy_distance(digits.train[:draws], digits.test))
pd.DataFrame(rows).T.rename_axis("energy distance")

# %% [markdown]
# The energy distance to the test set ([notebook 04](04_learned_variance.ipynb), section 5; 0 for
# equal distributions; 256 samples each, errors over these) says less than the bound does:
#
# - **At 10 steps the covariance is worth having**: 0.036 ± 0.011 against 0.073 ± 0.014 for the small
#   variance at half the calls, and 0.031 ± 0.011 for it with 25 steps, at about the same calls. At 50
#   steps both are level with 1000.
# - **DDIM and Heun draw the same digits at every $T$**, since $x_T$ decides; with noise the digit
#   changes with $T$. At 50 steps they agree on a distance of 0.036 ± 0.012 where ancestral sampling
#   has 0.010 ± 0.008; if that is more than chance, it is the flow's own, and not due to the steps.
# - **Heun's method with 10 steps is no better than the small variance** (0.092 ± 0.013). The levels
#   were chosen for a bound, which has no use for steps among noise, and the flow has to take that part
#   in two leaps. For a flow, try even levels.
#
# #
# ## 6. When not to use few steps
#
# A chain of 25 steps is another model than the one of 1000, with a bound of its own. Whether one
# wants it depends on what is asked for. Four ways to a figure for the same images:

# %%
pilot = Pilot.fit(long, digits.train, calls=2_000 if QUICK else 10_000)
termwise = TermwiseBound(calls=50, pilot=pilot).estimate(long, test, seed=0)
few = long.respaced(counts[-2], variance=calibrated, grid=grids["diagonal, 1 probe"])
particles = 1000 // few.calls_per_path
weighted = ImportanceBound(particles=particles).estimate(few, test, seed=0)
rows = {
    "T = 1000, one path": whole,
    "T = 1000, termwise with a pilot": termwise,
    f"T = {few.num_steps}, one path": PathBound(particles=1).estimate(few, test, seed=0),
    f"T = {few.num_steps}, {particles} paths, importance": weighted,
}
rows = {
    name: {
        "bits/dim": with_error(-result.value / unit),
        "above one path of T = 1000": with_error(worse(result)),
        "calls": round(result.network_evaluations),
    }
    for name, result in rows.items()
}
pd.DataFrame(rows).T

# %% [markdown]
# - **For the bound of the long chain, do not shorten it.** A pilot finds where the variance of its terms
#   is ([notebook 03](03_likelihood_bounds.ipynb)), and 50 calls give the ELBO of 1000 steps without
#   bias, here 0.066 below what 50 calls make of the short chain.
# - **For whole paths, do.** Importance weights, particles, conditioning and samples need every step of
#   a path. For the calls of *one* path of 1000 steps there are 20 of 25 steps, and their importance
#   bound is 0.033 ± 0.007 bits/dim *below* the ELBO of the long chain.
# - **Not where the steps are cheap and the products are not**: few dimensions (section 1), large
#   images with `"full"`, or a gap that some hundred analytic steps close.
# - **Not for a comparison with published figures** of 1000 steps. Log-likelihoods of chains with other
#   steps are those of other models. State $T$, the variance, the grid and the calls.
#
# ## Conclusion
#
# | digits, one path, against the same network's 1000 steps (fixed small, 1.837 bits/dim) | T = 10 | T = 25 | T = 50 | calls per step |
# |---|---|---|---|---|
# | fixed small | +1.044 ± 0.046 | +0.332 ± 0.019 | +0.178 ± 0.016 | 1 |
# | isotropic, 1 probe | +0.546 ± 0.021 | +0.196 ± 0.014 | +0.103 ± 0.012 | 2 |
# | diagonal, 1 probe | +0.229 ± 0.015 | +0.067 ± 0.009 | +0.012 ± 0.010 | 2 |
# | rank 1 + diagonal, 2 probes | +0.184 ± 0.013 | +0.042 ± 0.010 | +0.007 ± 0.010 | 5 |
# | full | +0.093 ± 0.009 | +0.012 ± 0.008 | −0.009 ± 0.008 | 65 |
#
# - **How many steps?** As many as the covariance of a step makes necessary: 25 to 50 with the one that
#   the denoiser knows.
# - **Which covariance?** For images the diagonal with one probe, calibrated; `"full"` to see what
#   there is to gain. A diagonal that is an output of the network takes one call a step
#   ([Fewer steps](../docs/howto/steps.md)).
# - **Which grid?** The optimal one, fitted on other data with the variance in use.
# - **Which sampler?** Ancestral with the covariance where steps are few.
#
# Limits: one small network on 8 × 8 images, 64 test images, one training. More pixels and more grey
# levels need more steps.

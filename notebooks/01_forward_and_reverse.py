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
# # The forward and the reverse chain, as Pyro programs
#
# A diffusion model is a hierarchical latent-variable model. Data $x_0$ has latents $x_1, \dots,
# x_T$ of the same shape, each noisier than the one before, and
#
# - the **forward chain** $q(x_{1:T} \mid x_0)$ adds noise. Nothing in it is learned: it is the
#   variational posterior, in Pyro's words the **guide**;
# - the **reverse chain** $p_\theta(x_{0:T})$ starts from noise and removes it. It is the generative
#   model, in Pyro's words the **model**.
#
# Training is variational inference on that pair: maximise $\log p_\theta(x_0) \ge \mathbb{E}_q[\log
# p_\theta(x_{0:T}) - \log q(x_{1:T} \mid x_0)]$. This notebook goes from the formulas to the two
# programs, checks the bound against an exact answer, shows the one mistake that is easy to make,
# and trains a small model. ([From the notes to the code](../docs/notes_to_code.md) has every
# formula beside its name in the library.)

# %%
# %matplotlib inline
import os
import textwrap
import warnings

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Normal, kl_divergence

from pyrodiff import ForwardChain, ReverseChain, data, plots
from pyrodiff.denoisers import NoiseDenoiser
from pyrodiff.kernels import marginal_coefficients
from pyrodiff.likelihood import TermwiseBound
from pyrodiff.networks import ResidualMLP
from pyrodiff.objectives import VariationalBound
from pyrodiff.oracles import Gaussian, GaussianMixture, linear_bound, linear_log_prob
from pyrodiff.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule

QUICK = os.environ.get("PYRODIFF_QUICK") == "1"  # fewer draws and steps, the same lesson
torch.set_num_threads(1)
pyro.set_rng_seed(0)

# %% [markdown]
# ## 1. How much noise, when
#
# One step of the forward chain shrinks $x$ a little and adds a little noise,
#
# $$q(x_t \mid x_{t-1}) = \mathcal N(\sqrt{1 - \beta_t}\, x_{t-1},\ \beta_t I),$$
#
# and many such steps amount to one large step,
#
# $$q(x_t \mid x_0) = \mathcal N(\alpha_t x_0,\ \sigma_t^2 I), \qquad
#   \alpha_t^2 = \bar\alpha_t = \prod_{s \le t} (1 - \beta_s), \quad
#   \sigma_t^2 = 1 - \bar\alpha_t .$$
#
# The library stores a single number per step, the log signal-to-noise ratio $\lambda_t = \log
# \alpha_t^2/\sigma_t^2$, in float64, and derives everything else from it: $\alpha_t^2 =
# \operatorname{sigmoid}(\lambda_t)$, $\sigma_t^2 = \operatorname{sigmoid}(-\lambda_t)$. A
# **schedule** is the curve $\lambda(u)$ over time $u$ from 0 (data) to 1 (noise).

# %%
schedules = {"linear": LinearSchedule(), "cosine": CosineSchedule(), "log-SNR": LogSNRSchedule()}
plots.schedule(schedules)[0].figure

# %% [markdown]
# Where a paper gives betas, $\lambda_t = \operatorname{logit} \bar\alpha_t$ is that paper's:

# %%
betas = LinearSchedule().betas(1000)
lambdas = ForwardChain(LinearSchedule(), num_steps=1000).log_snr
float((torch.logit((1 - betas).cumprod(0)) - lambdas).abs().max())

# %% [markdown]
# ## 2. The forward chain is a guide
#
# Written by hand, the forward chain is a loop over `pyro.sample`. Sites are called `x_1`, …, `x_T`;
# samples are independent, so they are in a plate; the dimensions of one sample are one event
# (`to_event`).

# %%
STEPS = 4
betas = CosineSchedule().betas(STEPS)


def by_hand(x_0):
    x_t = x_0
    with pyro.plate("data", len(x_0)):
        for t, beta in enumerate(betas, 1):
            law = dist.Normal((1 - beta).sqrt() * x_t, beta.sqrt()).to_event(1)
            x_t = pyro.sample(f"x_{t}", law)


# %% [markdown]
# `ForwardChain` is this program for any schedule, and for either of two **orders**. The same joint
# can be drawn from the data to the noise or, given $x_0$, from the noise back to the data:
#
# $$q(x_{1:T} \mid x_0)
#   = \underbrace{\prod_{t=1}^{T} q(x_t \mid x_{t-1})}_{\text{noising}}
#   = \underbrace{q(x_T \mid x_0) \prod_{t=2}^{T} q(x_{t-1} \mid x_t, x_0)}_{\text{denoising}}$$
#
# where $q(x_{t-1} \mid x_t, x_0)$ is Gaussian by Bayes' rule (`pyrodiff.kernels.posterior`). The
# denoising order is the default; section 6 says why. Pyro's trace of each program shows its sites
# in the order in which they are visited: the plate of 5 samples on the left of the bar, the 2
# dimensions of each on the right.

# %%
noising = ForwardChain(CosineSchedule(), num_steps=STEPS, order="noising")
denoising = ForwardChain(CosineSchedule(), num_steps=STEPS)
x_0 = torch.randn(5, 2, dtype=torch.float64)

for program in (noising, denoising):
    print(f'order="{program.order}"')
    print(poutine.trace(program).get_trace(x_0).format_shapes(), end="\n\n")

# %% [markdown]
# That all three programs have the same joint density can be checked: draw $x_{1:T}$ from one of them
# and evaluate $\log q(x_{1:T} \mid x_0)$ under each.

# %%
drawn = poutine.trace(noising).get_trace(x_0)
values = {f"x_{t}": drawn.nodes[f"x_{t}"]["value"] for t in range(1, STEPS + 1)}
for name, program in {"by hand": by_hand, "noising": noising, "denoising": denoising}.items():
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace(x_0)
    print(f"{name:>10}: {float(trace.log_prob_sum()):.12f} nats")

# %% [markdown]
# The paths look alike, too. Below, paths from two values of $x_0$ in one dimension: those on the
# left were drawn from $x_0$ towards the noise, those on the right from the noise towards $x_0$. The
# bands are $\alpha_t x_0 \pm 2 \sigma_t$, as $q(x_t \mid x_0)$ gives for both.


# %%
def trajectory(chain, x_0):
    """x_0, x_1, …, x_T of one run of the forward program, stacked; shape (T + 1, N, …)."""
    nodes = poutine.trace(chain).get_trace(x_0).nodes
    sites = [nodes[f"x_{t}"]["value"] for t in range(1, chain.num_steps + 1)]
    return torch.stack([x_0, *sites])


figure = Figure(figsize=(9.5, 3.4), layout="constrained")
t = torch.arange(61)
for panel, order in zip(figure.subplots(1, 2, sharey=True), ("noising", "denoising"), strict=True):
    chain = ForwardChain(CosineSchedule(), num_steps=60, order=order)
    alpha, sigma = marginal_coefficients(chain.log_snr)
    alpha, sigma = torch.cat([torch.ones(1), alpha]), torch.cat([torch.zeros(1), sigma])
    for start, colour in ((2.5, "#0072B2"), (-1.5, "#D55E00")):
        paths = trajectory(chain, torch.full((12, 1), start)).squeeze(-1)
        panel.plot(t, paths, color=colour, alpha=0.5, linewidth=0.8)
        low, high = alpha * start - 2 * sigma, alpha * start + 2 * sigma
        panel.fill_between(t, low, high, color=colour, alpha=0.12, linewidth=0)
    panel.set(title=f'order="{order}"', xlabel="timestep t (0: data, 60: noise)")
    panel.grid(alpha=0.25)
figure.axes[0].set_ylabel(r"$x_t$")
figure

# %% [markdown]
# ## 3. What the forward chain does to data
#
# A ring of eight Gaussians in the plane. Each panel is one site of one run of the guide; a point is
# coloured by where it began. The clusters blur, the ring closes, and at $t = T$ nothing is left of
# the data: a standard normal, with all colours mixed.

# %%
parts = data.mixture_parameters()
ring = GaussianMixture(parts.weights, parts.means / 1.43, parts.scale / 1.43)
chain = ForwardChain(LogSNRSchedule(8.0, -6.0), num_steps=100, order="noising")
cloud = trajectory(chain, ring.sample(1000, seed=0))
shown = [0, 20, 35, 45, 55, 65, 80, 100]
plots.trajectory_points(cloud, timesteps=shown, direction="forward")[0].figure

# %% [markdown]
# The same program on images, since a site can have any event shape: scikit-learn's digits, 8 × 8
# pixels.

# %%
digits = data.load("digits")
images = trajectory(chain, digits.train[[0, 3, 5, 8]])
plots.trajectory_strip(images, timesteps=shown, direction="forward").figure

# %% [markdown]
# How much of $x_0$ is left in the last latent is one number of the bound, $\mathrm{KL}(q(x_T \mid
# x_0) \,\|\, \mathcal N(0, I))$. It must be small: the reverse chain starts from $\mathcal N(0, I)$,
# and no training can make up for a poor start.

# %%
print(f"digits: {float(chain.prior_kl(digits.train).mean()):.3f} nats per image of 64 pixels")
print(f"ring:   {float(chain.prior_kl(cloud[0]).mean()):.3f} nats per point")

# %% [markdown]
# ## 4. The reverse chain is the model
#
# $$p_\theta(x_{0:T}) = \mathcal N(x_T; 0, I)\ \prod_{t=2}^{T}
#   \mathcal N(x_{t-1};\ \mu_\theta(x_t, t),\ \Sigma_\theta)\ \cdot\ p_\theta(x_0 \mid x_1), \qquad
#   \mu_\theta = c_0\, \hat x_0(x_t) + c_t\, x_t .$$
#
# The mean is that of $q(x_{t-1} \mid x_t, x_0)$ with a guess $\hat x_0(x_t)$ in the place of the
# unknown $x_0$. A **denoiser** makes the guess from a network: `NoiseDenoiser` reads the output as
# the noise $\hat\epsilon$, so that $\hat x_0 = (x_t - \sigma_t \hat\epsilon)/\alpha_t$. Which
# $\Sigma_\theta$ to take is the choice of a **variance**, and $p_\theta(x_0 \mid x_1)$ is a
# **decoder**; here the defaults, $\beta_t$ and a Gaussian.
#
# For Gaussian data the optimal network is known in closed form, so nothing has to be trained yet.

# %%
covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
gaussian = Gaussian(torch.tensor([0.5, -0.3]), covariance)
forward = ForwardChain(LogSNRSchedule(5.0, -5.0), num_steps=8)
reverse = ReverseChain(NoiseDenoiser(gaussian.network()), forward, event_shape=(2,))

print(poutine.trace(reverse).get_trace(x_0).format_shapes())

# %% [markdown]
# The model visits its sites from `x_8` to `x_1` and ends with `x_0`, which is observed where data
# is given. Without data the program generates: `reverse(num_samples=5)`, or `reverse.sample(5)`.
#
# ## 5. Pyro's mean-field ELBO is the decomposition of DDPM
#
# Ho et al. (2020, equation 5) rewrite the bound as a sum over steps,
#
# $$-\text{ELBO} = \underbrace{\mathrm{KL}(q(x_T \mid x_0) \,\|\, p(x_T))}_{\text{prior}} +
#   \sum_{t=2}^{T} \underbrace{\mathbb E_q\, \mathrm{KL}(q(x_{t-1} \mid x_t, x_0) \,\|\,
#     p_\theta(x_{t-1} \mid x_t))}_{L_t}
#   \ \underbrace{-\ \mathbb E_q \log p_\theta(x_0 \mid x_1)}_{L_1} .$$
#
# Put the two traces side by side: in **denoising** order the guide's site `x_{t−1}` has the law
# $q(x_{t-1} \mid x_t, x_0)$ and the model's site of that name has $p_\theta(x_{t-1} \mid x_t)$,
# both given the same $x_t$. Their KL is $L_t$. So the terms can be read off the traces, site by
# site, and as denoiser and data are Gaussian the exact terms are known
# (`pyrodiff.oracles.linear_bound`).

# %%
DRAWS = 2000 if QUICK else 20_000
x = gaussian.sample(1, seed=1)
exact = linear_bound(reverse, x)
many = x.expand(DRAWS, 2)  # one data point, many draws of its latents

guide_trace = poutine.trace(forward).get_trace(many)
model_trace = poutine.trace(poutine.replay(reverse, guide_trace)).get_trace(many)
terms = [-model_trace.nodes["x_0"]["fn"].log_prob(many)]
for t in range(2, forward.num_steps + 1):
    q, p = (trace.nodes[f"x_{t - 1}"]["fn"] for trace in (guide_trace, model_trace))
    terms.append(kl_divergence(q, p))
terms = torch.stack(terms)  # (T, DRAWS)
mean, error = terms.mean(1), terms.std(1) / DRAWS**0.5

figure = Figure(figsize=(6.5, 3.4), layout="constrained")
panel, t = figure.subplots(), range(1, forward.num_steps + 1)
panel.bar(t, exact.terms[0], color="#56B4E9", alpha=0.6, label="exact")
style = {"fmt": "o", "color": "black", "markersize": 4, "capsize": 3}
panel.errorbar(t, mean, 2 * error, label="from the traces, ± 2 standard errors", **style)
panel.set(xlabel="timestep t", ylabel="$L_t$ (nats)")
panel.legend(frameon=False)
figure

# %%
deviation = (mean - exact.terms[0]) / error
print(f"largest deviation: {float(deviation.abs().max()):.1f} standard errors")

# %% [markdown]
# Adding up such KLs over the sites is what `TraceMeanField_ELBO` does. `Trace_ELBO` averages $\log
# p - \log q$ over paths instead and uses no KLs; the library's `VariationalBound` visits a few
# random $t$ instead of all, and is the one to train with, since it costs one network call per
# sample. All three are Pyro ELBOs with the same expectation. Here they are with the exact answers:


# %%
def repeated(elbo, model, guide, x, draws, repeats=20):
    """−ELBO of one data point in nats, with its standard error."""
    many = x.expand(draws // repeats, -1)
    losses = torch.tensor([elbo.loss(model, guide, many) / len(many) for _ in range(repeats)])
    return f"{losses.mean():.4f} ± {losses.std() / repeats**0.5:.4f}"


print(f"exact −ELBO           {-float(exact.elbo):.4f}")
for elbo in (TraceMeanField_ELBO(), Trace_ELBO(), VariationalBound()):
    print(f"{type(elbo).__name__:<21} {repeated(elbo, reverse, forward, x, DRAWS)}")
print(f"exact −log p(x_0)     {-float(linear_log_prob(reverse, x)):.4f}")

# %% [markdown]
# The bound lies above $-\log p_\theta(x_0)$, by the KL between $q(x_{1:T} \mid x_0)$ and the
# model's own posterior, though the denoiser is optimal: eight steps are few. Notebook 03 is about
# that gap.
#
# ## 6. What goes wrong in the noising order
#
# It seems natural to write the guide as the notes do, from $x_0$ to $x_T$. Then the guide's site
# `x_t` has the law $q(x_t \mid x_{t-1})$, while the model's has $p_\theta(x_t \mid x_{t+1})$. An
# analytic KL between the two averages over $x_t$ while $x_{t+1}$, which the guide drew *from that
# very* $x_t$, stays fixed. The sum of such KLs is not the bound, nor any other bound. By hand:

# %%
backwards = ForwardChain(LogSNRSchedule(5.0, -5.0), num_steps=8, order="noising")
guide_trace = poutine.trace(backwards).get_trace(many)
model_trace = poutine.trace(poutine.replay(reverse, guide_trace)).get_trace(many)
total = -model_trace.nodes["x_0"]["fn"].log_prob(many)
for t in range(1, backwards.num_steps + 1):
    q, p = (trace.nodes[f"x_{t}"]["fn"].base_dist for trace in (guide_trace, model_trace))
    total += kl_divergence(Normal(q.loc, q.scale), Normal(p.loc, p.scale)).sum(-1)

print(f"sum of the wrong KLs: {total.mean():.2f} ± {total.std() / DRAWS**0.5:.2f}")
print(f"exact −ELBO:          {-float(exact.elbo):.2f}")

# %% [markdown]
# A plain Pyro guide would return such a number with a warning at most. Here it is refused, and the
# message names the remedy:

# %%
reverse_of_it = ReverseChain(NoiseDenoiser(gaussian.network()), backwards, event_shape=(2,))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pyro's, that it could not verify the order of the sites
    try:
        TraceMeanField_ELBO().loss(reverse_of_it, backwards, many)
    except ValueError as refusal:
        print(textwrap.fill(str(refusal), 100))

# %% [markdown]
# `Trace_ELBO` uses densities only and so is right in either order:

# %%
print("Trace_ELBO, noising:", repeated(Trace_ELBO(), reverse_of_it, backwards, x, DRAWS))

# %% [markdown]
# ## 7. Learning the reverse chain
#
# Now the ring again, with an untrained network: a residual perceptron that reads $x_t$ and
# $\lambda_t$. Model and guide go into Pyro's `SVI` as any pair does.

# %%
pyro.set_rng_seed(0)
forward = ForwardChain(LogSNRSchedule(8.0, -6.0), num_steps=100)
network = ResidualMLP((2,), width=64, blocks=2, fourier=(1.0, 2.0))
reverse = ReverseChain(NoiseDenoiser(network), forward, event_shape=(2,))

steps, batch = (600 if QUICK else 4000), 256
train = ring.sample(20_000, seed=1).float()
decay = 0.05 ** (1 / steps)  # the learning rate ends at a twentieth
optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": decay})
svi = SVI(reverse, forward, optimizer, loss=VariationalBound())

losses = []
for _ in range(steps):
    losses.append(svi.step(train[torch.randint(len(train), (batch,))]) / batch)

# %% [markdown]
# The loss of `VariationalBound` is noisy, since it visits one random $t$ per point. Its mean over
# many steps falls towards the entropy of the data, which is a limit for the mean of any bound.

# %%
window = 100 if QUICK else 200
means = torch.tensor(losses).unfold(0, window, window)
entropy = -float(ring.log_prob(ring.sample(100_000, seed=2)).mean())
figure = Figure(figsize=(6.5, 3.2), layout="constrained")
panel = figure.subplots()
style = {"fmt": "o-", "color": "#0072B2", "markersize": 4, "capsize": 2, "elinewidth": 1}
label = f"−ELBO per point, {window} steps, ± 2 standard errors"
middles, error = window * (torch.arange(len(means)) + 0.5), means.std(1) / window**0.5
panel.errorbar(middles, means.mean(1), 2 * error, label=label, **style)
panel.axhline(entropy, color="black", linestyle="--", label="entropy of the data")
panel.set(xlabel="step", ylabel="nats", ylim=(entropy - 0.5, entropy + 2))
panel.legend(frameon=False)
panel.grid(alpha=0.25)
figure

# %% [markdown]
# The trained chain, run backwards from noise. Colours show where a point will end. On the left that
# is still open; most of it is decided in the middle, where the forward chain lost it.

# %%
paths = reverse.sample(1000, seed=0, trajectory=True)
plots.trajectory_points(paths, timesteps=shown, direction="reverse")[0].figure

# %%
plots.samples_scatter(paths[0], data=ring.sample(4000, seed=3)).figure

# %% [markdown]
# How good is it? On unseen points, compare the bound with the exact $\log p$ of the data's
# distribution. Their difference is taken point by point, which removes what both share. The same
# chain with the *optimal* denoiser shows how much of it would remain after perfect training.

# %%
test = ring.sample(500 if QUICK else 2000, seed=4)
optimal = ReverseChain(NoiseDenoiser(ring.network()), forward, event_shape=(2,))
truth = ring.log_prob(test)
estimator, shortfall = TermwiseBound(evaluations=200), {}
for name, one in {"trained": reverse, "optimal": optimal}.items():
    shortfall[name] = truth - estimator.estimate(one, test.float(), seed=0).value
shortfall["trained − optimal"] = shortfall["trained"] - shortfall["optimal"]

print(f"exact mean log p of the data: {float(truth.mean()):.3f} nats; the bound is short of it by")
for name, values in shortfall.items():
    print(f"{name:>18}: {values.mean():.3f} ± {values.std() / len(test) ** 0.5:.3f} nats")

# %% [markdown]
# ## Conclusion
#
# - The forward chain is a **guide** and the reverse chain a **model** over the same sites; their
#   joint densities are products of the factors in the notes, and the guide's does not depend on the
#   order.
# - In **denoising** order, Pyro's `TraceMeanField_ELBO` is term for term the DDPM decomposition: on
#   a Gaussian it gives 1.525 ± 0.010 nats where the exact bound is 1.519. In **noising** order the
#   same sum of KLs is 4.67 ± 0.02, a bound on nothing, and is refused.
# - `SVI` with `VariationalBound` trains a reverse chain in seconds: on unseen points its bound is
#   0.142 ± 0.013 nats short of the exact log density of the data. Only 0.026 ± 0.003 of that is the
#   network's; with the optimal denoiser the same chain would still be 0.115 ± 0.013 short.
# - Why even the optimal denoiser falls short, and how to tell a poor bound from a poor model, is
#   the subject of notebook 03.

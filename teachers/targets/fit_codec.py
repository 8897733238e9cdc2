"""How the code of hidden states is fitted: directions, bits of each, and what the code loses.

What is kept of a final hidden state x is judged by the distribution it gives back. The top tokens
and the tail's mass P are exact whatever happens to x; an error e in x changes how that mass is
spread, by about ½ P · Var(W·e) nats over the tail's own tokens. Summed over positions that is
½ eᵀMe with M = Σ P · Cov(W) by each position's own tail, averaged over T = 1 and T = 3. Principal
directions in that metric are fitted on some texts; on others is measured what rounding each to 1,
2, … bits costs, and every bit goes where it takes most away (reverse water-filling). There too the
KL of the distributions that come back is measured, and no more bytes taken than it needs.

Letters: N positions, D width of the hidden state, R kept coordinates, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teachers.targets.bit_packing import MOST_BITS
from teachers.targets.distributions import CompactTargets
from teachers.targets.output_head import OutputHead, soft_capped
from teachers.targets.recipe import Recipe, least_sketch_bytes
from teachers.targets.state_codec import Basis, OutputRows, output_parts
from teachers.targets.threads import one_thread

FIT_RULES = 3  # part of a store's identity: to be counted up with whatever changes what is fitted
FIT_POSITIONS = 8192  # hidden states that are looked at, at most,
FIT_SHARE = 0.0625  # and of all positions, so that fitting costs little of the capture's time,
FIT_LEAST = 1024  # but at least
HELD_BACK = 4  # one of so many says how much states vary that no directions were fitted to
FEW = 64  # states or fewer: all are used for everything
ROUNDED_POSITIONS = 1024  # of those held back, how many say what rounding costs
CHECK_POSITIONS = 128  # and on how many the distributions that come back are compared
METRIC_POSITIONS = 128  # of all, how many say which errors count
METRIC_TOPK = 16  # tokens of each that are not tail
METRIC_TEMPERATURES = (1.0, 3.0)
NEGLIGIBLE = 1e-5  # of the strongest direction: what is weaker is rounding, not signal
RIDGE = 1e-5  # of the metric's mean diagonal, so that it can be inverted
AT_ONCE = 16  # positions whose distributions are compared together
BYTES_APART = 8  # budgets that are tried
# Half of the range that the codes of a coordinate span, in standard deviations: which is best
# depends on its bits and on how often it is far out.
RANGES = (1.3, 1.6, 2.0, 2.5, 3.0, 3.6, 4.3, 5.2, 6.5)


@dataclass(frozen=True)
class Sketch:
    """The fitted code of final hidden states, what turns it into logits, and the mean KL(teacher ‖
    what comes back) at T = 1 in nats, of positions that nothing was fitted to."""

    basis: Basis
    head: OutputHead
    kl: float


@dataclass(frozen=True)
class Directions:
    """Principal directions of some states, and what rounding along each costs.

    ``mean [D]``, ``encode [D, R]``, ``decode [R, D]``: as in ``Basis``. ``errors``, ``steps``
    ``[R, MOST_BITS + 1]``, float64 and float32: of so many bits the mean squared error, measured on
    other states, and the step.
    """

    mean: Tensor
    encode: Tensor
    decode: Tensor
    errors: Tensor
    steps: Tensor

    def bits(self, budget: int) -> Tensor:
        """Of each direction in ``budget`` bytes a position, ``[R]``."""
        return divide_bits(self.errors, 8 * budget)

    def only(self, kept: Tensor) -> Directions:
        """Some of the directions: those set in ``kept [R]``."""
        encode, decode = self.encode[:, kept].contiguous(), self.decode[kept]
        return Directions(self.mean, encode, decode, self.errors[kept], self.steps[kept])

    def basis(self, budget: int) -> Basis:
        """The code of at most ``budget`` bytes a position."""
        bits = self.bits(budget)
        kept = self.only(bits > 0)
        bits = bits[bits > 0]
        steps = kept.steps.gather(1, bits[:, None])[:, 0]
        return Basis(kept.mean, kept.encode, kept.decode, steps, bits.to(torch.uint8))


def divide_bits(errors: Tensor, total: int) -> Tensor:
    """Bits of each coordinate, ``[R]``, at most ``total`` together, so that the sum of ``errors
    [R, MOST_BITS + 1]`` is least: one bit after another where it takes most away."""
    gains = (errors[:, :-1] - errors[:, 1:]).cummin(dim=1).values  # a later bit is worth no more
    worth, order = gains.flatten().sort(descending=True, stable=True)
    order = order[:total][worth[:total] > 0.0]
    return torch.bincount(order // MOST_BITS, minlength=len(errors))


def fit_directions(states: Tensor, metric: Tensor | None) -> Directions:
    """Fit the directions to the first three quarters of ``states [N, D]``, and what rounding costs
    to the rest, which are of other texts: along weak directions other states vary many times more
    than those that the directions were fitted to.

    ``metric [D, D]`` symmetric and positive, or ``None`` for the plain squared error.
    """
    count = len(states)
    fitted, others = states, states
    if count >= FEW:
        fitted, others = states.split((count - count // HELD_BACK, count // HELD_BACK))
    mean = fitted.double().mean(dim=0)
    centered = fitted.double() - mean
    with one_thread():
        factor = None if metric is None else torch.linalg.cholesky(metric)
    directions = _principal(centered if factor is None else centered @ factor)
    if factor is None:
        encode, decode = directions.T, directions
    else:
        encode = factor @ directions.T
        decode = torch.linalg.solve_triangular(factor, directions, upper=False, left=False)
    mean, encode, decode = mean.float(), encode.float().contiguous(), decode.float()
    some = others[:: -(-len(others) // ROUNDED_POSITIONS)]
    errors, steps = _rounding((some - mean) @ encode)
    return Directions(mean, encode, decode, errors, steps)


def _rounding(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Least mean squared error of ``coordinates [n, R]`` in 0, 1, … bits, and the step that has
    it, ``[R, MOST_BITS + 1]`` each."""
    squares = coordinates.double().square().mean(dim=0)
    deviations = squares.sqrt().float().clamp(min=1e-30)
    errors, steps = [squares], [deviations]
    for bits in range(1, MOST_BITS + 1):
        half = 2.0 ** (bits - 1)
        tried = deviations * torch.tensor(RANGES)[:, None] / half
        lost = []
        for step in tried:
            rounded = (coordinates / step).floor_().clamp_(-half, half - 1).add_(0.5).mul_(step)
            lost.append(rounded.sub_(coordinates).square_().mean(dim=0))
        least = torch.stack(lost).min(dim=0)
        errors.append(least.values.double())
        steps.append(tried.gather(0, least.indices[None])[0])
    return torch.stack(errors, dim=1), torch.stack(steps, dim=1)


def fit_basis(states: Tensor, metric: Tensor | None, budget: int) -> Basis:
    """The code of at most ``budget`` bytes fitted to ``states [N, D]``; ``metric``: see
    ``fit_directions``."""
    return fit_directions(states, metric).basis(budget)


def fit_sketch(
    states: Tensor, rows: OutputRows, vocab_size: int, recipe: Recipe, cap: float = 0.0
) -> Sketch:
    """Fit the code of final hidden ``states [N, D]`` to the recipe's bytes, or to the fewest that
    lose no more than it allows."""
    check = checked(states)
    some = states[:: max(1, len(states) // METRIC_POSITIONS)][:METRIC_POSITIONS]
    directions = fit_directions(states, tail_metric(some, rows, vocab_size, cap))
    most, allowed = recipe.sketch_bytes, recipe.sketch_kl
    directions = directions.only(directions.bits(most) > 0)
    head = directions.basis(most).head(rows, vocab_size, cap)
    parts = [check @ part.T for _, part in output_parts(rows, vocab_size)]
    logits = soft_capped(torch.cat(parts, dim=-1), cap)
    kept = CompactTargets.from_logits(logits, recipe.num_topk)

    def sketch(budget: int) -> Sketch:
        basis, own = directions.basis(budget), head.only(directions.bits(budget) > 0)
        code = basis.coordinates(*basis.encoded(check))
        return Sketch(basis, own, _lost(logits, replace(kept, coordinates=code, head=own)))

    if not allowed:
        return sketch(most)
    tried = [*range(least_sketch_bytes(recipe, vocab_size), most, BYTES_APART), most]
    found = bisect_left(tried[:-1], True, key=lambda budget: sketch(budget).kl <= allowed)
    return sketch(tried[found])


def checked(states: Tensor) -> Tensor:
    """The positions, of those that the directions were not fitted to, on which the code's loss is
    measured."""
    others = states[-max(1, len(states) // HELD_BACK) :]
    return others[:: -(-len(others) // CHECK_POSITIONS)]


def _lost(logits: Tensor, targets: CompactTargets) -> float:
    """Mean KL(teacher ‖ targets) at T = 1, of the teacher's own ``logits [N, V]``, a few positions
    at a time."""
    total = 0.0
    for start in range(0, len(logits), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        exact, said = logits[some].log_softmax(dim=-1), targets.select(some).log_probs(1.0)
        total += float((exact.exp() * (exact - said)).sum(dtype=torch.float64))
    return total / len(logits)


def _principal(rows: Tensor) -> Tensor:
    """Right singular vectors ``[R, D]`` of float64 ``[N, D]``, strongest first, those that are not
    negligible; the largest component of each is positive, whatever LAPACK says.

    From the eigenvectors of the smaller Gram matrix, which take a fraction of the decomposition's
    own time. Squaring costs digits of the weak directions: about seven are left at ``NEGLIGIBLE``.
    """
    tall = rows.shape[0] >= rows.shape[1]
    gram = rows.T @ rows if tall else rows @ rows.T
    with one_thread():
        squares, vectors = torch.linalg.eigh(gram)
    singular = squares.flip(0).clamp(min=0.0).sqrt()
    singular = singular[singular > NEGLIGIBLE * singular[0]]
    vectors = vectors.flip(1)[:, : len(singular)]
    directions = vectors.T if tall else (rows.T @ vectors / singular).T
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return directions * largest.sign()


def tail_metric(states: Tensor, rows: OutputRows, vocab_size: int, cap: float = 0.0) -> Tensor:
    """M of the module's docstring, float64 ``[D, D]``, from ``states [n, D]``.

    Under a soft ``cap`` an error moves a logit by its slope there less than W·e, and the more so
    the greater it is; w_v is multiplied by its average.
    """
    logits = torch.cat([states @ part.T for _, part in output_parts(rows, vocab_size)], dim=-1)
    slopes = torch.ones(vocab_size, 1)
    if cap:
        slopes = (1.0 - (soft_capped(logits, cap) / cap).square()).mean(dim=0)[:, None]
    top = logits.topk(min(METRIC_TOPK, vocab_size - 1), dim=-1).indices
    shares = [torch.softmax(logits / t, dim=-1) for t in METRIC_TEMPERATURES]
    tails = torch.cat([share.scatter_(-1, top, 0.0) for share in shares])  # [2 n, V]
    masses = tails.sum(dim=-1, dtype=torch.float64)
    weights = tails.sum(dim=0)
    center = torch.zeros(states.shape[1], dtype=torch.float64)
    for start, part in output_parts(rows, vocab_size):
        here = slice(start, start + len(part))
        center += weights[here].double() @ (part * slopes[here]).double()
    center /= masses.sum()
    # Σ P Cov = Σ p w wᵀ − Σ P w̄ w̄ᵀ, with the rows w relative to the centre of them all.
    width = len(center)
    whole, sums = torch.zeros(width, width).double(), torch.zeros(len(tails), width)
    for start, part in output_parts(rows, vocab_size):
        here = slice(start, start + len(part))
        relative = part * slopes[here] - center.float()
        whole += ((relative * weights[here, None]).T @ relative).double()
        sums += tails[:, here] @ relative
    means = sums.double() / masses.sqrt().clamp(min=1e-150)[:, None]
    ridge = RIDGE * whole.diagonal().mean() + 1e-30
    metric = whole - means.T @ means + ridge * torch.eye(width, dtype=torch.float64)
    return metric / len(tails)

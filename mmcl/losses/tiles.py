"""The logits of a global batch, walked in tiles: the core under every objective.

A rank holds n queries q_i (already multiplied by the logit scale) and all N keys y_j. It walks its (n, N) block of
logits q_i.y_j tile by tile and keeps statistics only; the backward walk computes each tile once more and forms both
gradients from it. So memory grows with (n + N) d and not with n N, and there and back cost four matrix products of
n N d, the least that exact gradients of both sides take where the logits are not kept. The statistics are those of
Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; tiles for contrastive losses are Inf-CL, Cheng et al.
2024, https://arxiv.org/abs/2410.17243.

Statistics are fp32, or float64 for float64 inputs. Products are bf16 under bf16 autocast.

Inside a walk logits are in units of ln 2 ("bits"), because powers of two are what processors compute: `exp2` takes a
third of the time of `exp` on a CPU, `softplus` thirty times that.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmcl.dist import Gathered

LN2 = math.log(2)

SAFE = 86.0
"""Powers of two of numbers within this distance of 0 add up to finite fp32 numbers that keep their digits."""

CPU_TILE = (1024, 1024)
GPU_TILE = (8192, 8192)
"""Rows and columns: what stays in a CPU's caches, and what fills a GPU with 256 MiB of fp32."""

CPU_BLOCK = 1 << 23
GPU_BLOCK = 1 << 26
MIN_ROWS = 64
"""Logits of a block of whole rows, likewise; and rows of one, at least, so that its products are products."""

FEW = 64
"""Numbers from 1 to 2 whose product is no larger than float32 holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """Logits that do not count, as if they were minus infinity. There must be a key of its own for every query."""

    own: bool = False
    """Each row's own column."""
    same: Int[Tensor, "n k"] | None = None
    """Every other column that has one of its k ids in common with the row, for this rank's rows; ids below 0 match
    nothing."""


NOTHING = Skip()


def log_sum_exp(
    queries: Float[Tensor, "n d"], keys: Gathered, skip: Skip = NOTHING
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Row and column log-sum-exp of the logits of all ranks, for this rank's n queries and its own m keys.

        rows_i = log sum_j exp(q_i.y_j)        columns_j = log sum_i exp(q_i.y_j)

    An empty sum is minus infinity, without a gradient. Collective, backward too.
    """
    return _LogSumExp.apply(queries, keys.values, _Terms(keys, skip))[:2]  # pyright: ignore


def log_sum_exp_and_own(
    queries: Float[Tensor, "n d"], keys: Gathered, same: Int[Tensor, "n k"] | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """`log_sum_exp`, and each row's own logit, which is exact and exactly so in both sums; the walk may be in bf16.

    What a row is pulled by is the difference of the two, and once it has learnt its pair that is next to nothing: it
    has to be the same number on both sides.
    """
    return _LogSumExp.apply(queries, keys.values, _Terms(keys, Skip(own=True, same=same), exact_own=True))  # pyright: ignore


def log_sum_exp_of_rows(queries: Float[Tensor, "n d"], keys: Gathered, skip: Skip = NOTHING) -> Float[Tensor, " n"]:
    """The first half of `log_sum_exp`, for keys that never ask. Collective for `skip` only."""
    return _LogSumExp.apply(queries, keys.values, _Terms(keys, skip, columns=False))[0]  # pyright: ignore


@torch.no_grad()
def expected_logits(
    queries: Float[Tensor, "n d"], keys: Gathered, rows: Float[Tensor, " n"], skip: Skip = NOTHING
) -> Float[Tensor, " n"]:
    """The mean logit of each row under its softmax, given its log-sum-exp; 0 for an empty row. Without a gradient.

    One matrix product. Collective for `skip` only.
    """
    walk = _begin(queries, keys.values, _Terms(keys, skip))
    total = torch.zeros_like(rows)
    least = rows.masked_fill(rows == -torch.inf, torch.inf) / LN2
    with torch.autocast(queries.device.type, enabled=False):
        for r, _, logits, skipped in walk:
            shares = (logits - least[r, None]).exp2_()
            if skipped is not None:
                shares.masked_fill_(skipped, 0.0)
            total[r] += shares.mul_(logits).sum(1)
    return total.mul_(LN2)


def means(
    queries: Float[Tensor, "n d"], keys: Gathered, skip: Skip = NOTHING
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Row and column means of the logits of all ranks, for this rank's queries and keys; 0 where none counts.

    Collective, backward too.
    """
    rows, columns = _Means.apply(queries, keys.values, _Terms(keys, skip))  # pyright: ignore
    return rows, columns


def sum_of_log_sum_exp(
    base: Float[Tensor, " n"],
    weights: Float[Tensor, " n"],
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
) -> Float[Tensor, ""]:
    """sum_i weights_i log( exp(base_i) + sum_j exp(q_i.y_j) ), for keys that never ask. Not collective.

    Only a row's own sum normalises its gradient. A block of whole rows has it, so that one walk over such blocks forms
    the gradients too: three matrix products, one less than by way of `log_sum_exp_of_rows`. Weights get no gradient.
    """
    return _SumOfLogSumExp.apply(base, weights.detach(), queries, keys)  # pyright: ignore


def sum_of_softplus(
    queries: Float[Tensor, "n d"], keys: Gathered, bias: Float[Tensor, ""], skip: Skip = NOTHING
) -> Float[Tensor, ""]:
    """The sum over this rank's rows and all keys of log(1 + exp(q_i.y_j + b)). Not collective, except for `skip`.

    Its gradient needs no normaliser, so the forward walk forms it: three matrix products in all.
    """
    return _SumOfSoftplus.apply(queries, keys.values, bias, _Terms(keys, skip))  # pyright: ignore


class _Terms:
    """What a walk needs to know beside the tensors that have gradients. Collective where ids are compared."""

    def __init__(self, keys: Gathered, skip: Skip, *, columns: bool = True, exact_own: bool = False) -> None:
        self.shard, self.counts, self.own, self.columns = keys.shard, keys.counts, keys.own, columns
        self.exact_own = exact_own
        self.skip_own, self.same, self.every_same = skip.own, None, None
        if skip.same is not None:
            every = self.shard.gather_like(skip.same, self.counts)
            self.same, self.every_same = skip.same.masked_fill(skip.same < 0, -1), every.masked_fill(every < 0, -2)

    def skipped(self, r: slice, c: slice, device: torch.device) -> Tensor | None:
        """Which logits of a tile do not count; None where all do."""
        low, high = max(r.start + self.own.start, c.start), min(r.stop + self.own.start, c.stop)  # own columns in it
        if self.same is None and not (self.skip_own and low < high):
            return None
        skipped = torch.zeros(r.stop - r.start, c.stop - c.start, dtype=torch.bool, device=device)
        if self.same is not None and self.every_same is not None:
            for ids, every in zip(self.same[r].T, self.every_same[c].T, strict=True):
                skipped |= ids[:, None] == every
        if low < high:
            first = low - self.own.start - r.start
            skipped[first : first + high - low, low - c.start : high - c.start].fill_diagonal_(self.skip_own)
        return skipped


class _Walk:
    """The tiles of this rank's block of logits in bits: products in one type, everything else in another."""

    def __init__(self, bits: Tensor, y: Tensor, terms: _Terms, dtype: torch.dtype) -> None:
        """`bits` and `y` are in the type of products already, as `_begin` and the walk on the way there made them."""
        self.q, self.y, self.terms, self.dtype, self.product_dtype = bits, y, terms, dtype, bits.dtype
        rows, columns = GPU_TILE if bits.is_cuda else CPU_TILE
        self.rows, self.columns = _parts(len(bits), rows), _parts(len(y), columns)
        self.product = bits.new_empty(min(rows, len(bits)) * min(columns, len(y)))
        self.tile = self.product if bits.dtype == dtype else self.product.to(dtype)

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Rows, columns, their logits (overwritten by the next tile's), and which of them do not count."""
        for r, c, logits, skipped in self.empty():
            product = self._view(self.product, r, c)
            torch.mm(self.q[r], self.y[c].T, out=product)
            if product.dtype != logits.dtype:
                logits.copy_(product)
            yield r, c, logits, skipped

    def empty(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Likewise with the room for the logits only."""
        for r in self.rows:
            for c in self.columns:
                yield r, c, self._view(self.tile, r, c), self.terms.skipped(r, c, self.q.device)

    def bound(self) -> float:
        """No logit is larger: the product of the longest query and the longest key. Waits for the device."""
        if not len(self.q) or not len(self.y):
            return 0.0
        return float(self.q.to(self.dtype).norm(dim=1).max() * self.y.to(self.dtype).norm(dim=1).max())

    def add_gradients(self, r: slice, c: slice, wanted: Tensor, to_q: Tensor | None, to_y: Tensor | None) -> None:
        """Add what the gradient of one tile's logits, `wanted`, means for its queries and, in bits, for its keys."""
        if self.product_dtype == self.dtype:
            if to_q is not None:
                to_q[r].addmm_(wanted, self.y[c])
            if to_y is not None:
                to_y[c].addmm_(wanted.T, self.q[r])
            return
        rounded = self._view(self.product, r, c).copy_(wanted)
        if to_q is not None:
            to_q[r].add_(rounded @ self.y[c])
        if to_y is not None:
            to_y[c].add_(rounded.T @ self.q[r])

    def add_own_gradients(self, wanted: Tensor, to_q: Tensor | None, to_y: Tensor | None) -> None:
        """Likewise of the logits of queries with their own keys, a column of them."""
        own = self.terms.own
        if to_q is not None:
            to_q.addcmul_(wanted, self.y[own].to(self.dtype))
        if to_y is not None:
            to_y[own].addcmul_(wanted, self.q.to(self.dtype))

    def _view(self, buffer: Tensor, r: slice, c: slice) -> Tensor:
        rows, columns = r.stop - r.start, c.stop - c.start
        return buffer[: rows * columns].view(rows, columns)


def _begin(q: Tensor, y: Tensor, terms: _Terms) -> _Walk:
    """A walk over the logits of queries and keys as they are given."""
    product_dtype = _product_dtype(q, y)
    return _Walk((q.detach() / LN2).to(product_dtype), y.detach().to(product_dtype), terms, _dtype(q, y))


def _dtype(q: Tensor, y: Tensor) -> torch.dtype:
    """Of statistics and gradients."""
    return torch.promote_types(torch.promote_types(q.dtype, y.dtype), torch.float32)


def _product_dtype(q: Tensor, y: Tensor) -> torch.dtype:
    """bf16 under bf16 autocast, but not fp16 under fp16: there the shares of a large batch would vanish."""
    kind, dtype = q.device.type, _dtype(q, y)
    low = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if low and dtype == torch.float32 else dtype


def _parts(size: int, part: int) -> list[slice]:
    return [slice(start, min(start + part, size)) for start in range(0, size, part)]


def _power(logits: Tensor, shift: float, skipped: Tensor | None) -> Tensor:
    """Two to the logits, in place, and 0 where skipped."""
    if shift:
        logits.sub_(shift)
    logits.exp2_()
    return logits if skipped is None else logits.masked_fill_(skipped, 0.0)


def _gradients(ctx: Any, q: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Zeros to add to, for the inputs that want a gradient."""
    return (
        torch.zeros_like(q, dtype=dtype) if ctx.needs_input_grad[0] else None,
        torch.zeros_like(y, dtype=dtype) if ctx.needs_input_grad[1] else None,
    )


def _statistics(walk: _Walk, shift: float | None) -> tuple[Tensor, ...]:
    """Log-sum-exp of this rank's block by row and by column.

    One power of two serves both, less a `shift` in bits common to all, which loses a row whose largest logit lies far
    below it. With None each sum has a maximum of its own, at the cost of two exponentials.
    """
    start, of_columns = -torch.inf if shift is None else 0.0, walk.terms.columns
    rows, columns = (side.new_full((len(side),), start, dtype=walk.dtype) for side in (walk.q, walk.y))
    for r, c, logits, skipped in walk:
        if shift is None:
            logits.mul_(LN2)
            if skipped is not None:
                logits.masked_fill_(skipped, -torch.inf)
            rows[r] = torch.logaddexp(rows[r], logits.logsumexp(1))
            if of_columns:
                columns[c] = torch.logaddexp(columns[c], logits.logsumexp(0))
        else:
            powers = _power(logits, shift, skipped)
            rows[r] += powers.sum(1)
            if of_columns:
                columns[c] += powers.sum(0)
    found = (rows, columns) if of_columns else (rows,)
    return found if shift is None else tuple(side.log_().add_(shift * LN2) for side in found)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, y: Tensor, terms: _Terms) -> tuple[Tensor | None, ...]:
        walk, own = _begin(q, y, terms), None
        with torch.autocast(q.device.type, enabled=False):
            shift: float | None = max(0.0, walk.bound() - SAFE)
            found = _statistics(walk, shift)
            if shift and min(float(side.min()) for side in found) < (shift - SAFE) * LN2:
                shift = None
                found = _statistics(walk, shift)
            if terms.exact_own:
                own = torch.linalg.vecdot(q, y[terms.own]).to(walk.dtype)
                for side in (found[0], found[1][terms.own]):
                    torch.logaddexp(side, own, out=side)
            rows, columns = found[0], terms.shard.log_sum_exp(found[1]) if terms.columns else None
        ctx.save_for_backward(walk.q, walk.y, rows, columns, own)
        ctx.terms, ctx.shift, ctx.dtype = terms, shift, walk.dtype
        return rows.clone(), None if columns is None else columns[terms.own].clone(), own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        bits, y, rows, columns, own = ctx.saved_tensors
        terms, shift = ctx.terms, ctx.shift
        of_rows, of_columns, of_own = grads
        assert of_rows is not None
        walk = _Walk(bits, y, terms, ctx.dtype)
        to_q, to_y = _gradients(ctx, bits, y, walk.dtype)
        if own is not None:
            assert of_columns is not None and of_own is not None
            shares = of_rows * (own - rows).exp() + of_columns * (own - columns[terms.own]).exp() + of_own
            walk.add_own_gradients(shares[:, None], to_q, to_y)
        of_columns = None if of_columns is None else terms.shard.gather_like(of_columns, terms.counts)
        rows, columns = _without_empty(rows), _without_empty(columns)
        by_row = of_rows * torch.exp((shift or 0.0) * LN2 - rows)
        by_column = None if of_columns is None else of_columns * torch.exp((shift or 0.0) * LN2 - columns)
        shares = torch.empty_like(walk.tile)
        for r, c, logits, skipped in walk:
            weights = shares[: logits.numel()].view_as(logits)
            if shift is None:
                logits.mul_(LN2)
                if skipped is not None:
                    logits.masked_fill_(skipped, -torch.inf)
                if of_columns is not None:
                    torch.sub(logits, columns[c], out=weights).exp_().mul_(of_columns[c])
                logits.sub_(rows[r, None]).exp_().mul_(of_rows[r, None])
                if of_columns is not None:
                    logits.add_(weights)
            elif by_column is None:
                _power(logits, shift, skipped).mul_(by_row[r, None])
            else:
                torch.add(by_row[r, None], by_column[c], out=weights)
                _power(logits, shift, skipped).mul_(weights)
            walk.add_gradients(r, c, logits, to_q, to_y)
        return to_q, _from_bits(to_y), None


def _without_empty(sums: Tensor | None) -> Any:
    """Log-sum-exps of which empty ones give no gradient: exp(-(+inf)) is 0."""
    return sums if sums is None else sums.masked_fill(sums == -torch.inf, torch.inf)


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, y: Tensor, terms: _Terms) -> tuple[Tensor, Tensor]:
        walk = _begin(q, y, terms)
        rows, columns = (side.new_zeros(len(side), 2, dtype=walk.dtype) for side in (q, y))  # counts, sums
        with torch.autocast(q.device.type, enabled=False):
            for r, c, logits, skipped in walk:
                counted = torch.ones_like(logits)
                if skipped is not None:
                    counted.masked_fill_(skipped, 0.0)
                    logits.masked_fill_(skipped, 0.0)
                for side, part, axis in ((rows, r, 1), (columns, c, 0)):
                    side[part] += torch.stack([counted.sum(axis), logits.sum(axis) * LN2], 1)
            columns = terms.shard.sum(columns)
        ctx.save_for_backward(walk.q, walk.y, rows[:, 0].clamp(min=1.0), columns[:, 0].clamp(min=1.0))
        ctx.terms, ctx.dtype = terms, walk.dtype
        means_of_rows, means_of_columns = (side[:, 1] / side[:, 0].clamp(min=1.0) for side in (rows, columns))
        return means_of_rows, means_of_columns[terms.own].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bits, y, rows, columns = ctx.saved_tensors
        terms = ctx.terms
        by_row, by_column = grads[0] / rows, terms.shard.gather_like(grads[1], terms.counts) / columns
        walk = _Walk(bits, y, terms, ctx.dtype)
        to_q, to_y = _gradients(ctx, bits, y, walk.dtype)
        for r, c, logits, skipped in walk.empty():
            torch.add(by_row[r, None], by_column[c], out=logits)
            walk.add_gradients(r, c, logits if skipped is None else logits.masked_fill_(skipped, 0.0), to_q, to_y)
        return to_q, _from_bits(to_y), None


class _SumOfLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, weights: Tensor, q: Tensor, y: Tensor) -> Tensor:
        dtype, product_dtype = _dtype(q, y), _product_dtype(q, y)
        queries, keys = (q / LN2).to(product_dtype), y.to(product_dtype)
        total, to_base = base.new_zeros((), dtype=torch.float64), torch.zeros_like(base)
        to_q, to_y = torch.empty_like(q, dtype=dtype), torch.zeros_like(y, dtype=dtype)
        block = max(MIN_ROWS, (GPU_BLOCK if q.is_cuda else CPU_BLOCK) // max(1, len(y)))
        room = queries.new_empty(min(block, len(q)), len(y))  # in one piece for all blocks: fresh memory takes time
        with torch.autocast(q.device.type, enabled=False):
            for r in _parts(len(q), block):
                logits = room[: r.stop - r.start]
                for c in _parts(len(y), (GPU_TILE if q.is_cuda else CPU_TILE)[1]):
                    torch.mm(queries[r], keys[c].T, out=logits[:, c])
                powers = logits.to(dtype)
                own = base[r] / LN2
                largest = torch.maximum(own, powers.amax(1)) if len(y) else own.clone()
                largest.masked_fill_(largest == -torch.inf, 0.0)  # an empty sum
                powers.sub_(largest[:, None]).exp2_()
                own = (own - largest).exp2_()
                sums = powers.sum(1).add_(own)
                total += (weights[r] * (sums.log2() + largest)).sum()
                by_row = weights[r] / sums
                to_base[r] = own * by_row
                shares = powers.mul_(by_row[:, None]).to(product_dtype)
                to_q[r] = shares @ keys
                if product_dtype == dtype:
                    to_y.addmm_(shares.T, queries[r])
                else:
                    to_y.add_(shares.T @ queries[r])
        ctx.save_for_backward(to_base, to_q, _from_bits(to_y))
        return (total * LN2).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_base, to_q, to_y = (part * grads[0] for part in ctx.saved_tensors)
        return to_base, None, to_q, to_y


class _SumOfSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, y: Tensor, bias: Tensor, terms: _Terms) -> Tensor:
        walk = _begin(q, y, terms)
        to_q, to_y = _gradients(ctx, q, y, walk.dtype)
        total, to_bias = torch.zeros(2, dtype=torch.float64, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            shift, room = bias.detach() / LN2, torch.empty_like(walk.tile)
            for r, c, logits, skipped in walk:
                logits.add_(shift)
                if skipped is not None:
                    logits.masked_fill_(skipped, -torch.inf)
                total += _sum_of_softplus_of_bits(logits, room[: logits.numel()].view_as(logits))
                logits.mul_(LN2).sigmoid_()
                to_bias += logits.sum()
                walk.add_gradients(r, c, logits, to_q, to_y)
        ctx.save_for_backward(to_q, _from_bits(to_y), to_bias.to(bias.dtype))
        return total.to(walk.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_q, to_y, to_bias = ctx.saved_tensors
        parts = [None if part is None else part * grads[0] for part in (to_q, to_y, to_bias)]
        return (*parts, None)


def _sum_of_softplus_of_bits(bits: Tensor, room: Tensor) -> Tensor:
    """Of log(1 + 2^b) over all elements, where minus infinity adds 0; `room` is overwritten.

    The larger of b and 0, and log(1 + 2^-|b|). Of 1 + 2^-|b| the product of a few serves as well as each, which saves
    most of the logarithms, and what is rounded off of it counts to first order.
    """
    positive = torch.clamp(bits, min=0.0, out=room).sum()
    small = torch.abs(bits, out=room).neg_().exp2_()
    one_more = small + 1
    few = one_more.numel() // FEW * FEW
    products = one_more.view(-1)[:few].view(-1, FEW).prod(1), one_more.view(-1)[few:].prod()
    logs = sum(product.log().sum() for product in products)
    return positive * LN2 + logs + small.sub_(one_more.sub_(1)).sum()


def _from_bits(to_y: Tensor | None) -> Tensor | None:
    """The gradient of keys whose queries were in bits."""
    return to_y if to_y is None else to_y.mul_(LN2)

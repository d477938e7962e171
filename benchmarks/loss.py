"""Time of our InfoNCE beside open_clip's ClipLoss: one process, the same input, forward and backward.

The floor is the matrix products that no implementation can leave out: the (N, N) logits, which one product gives for
both directions, and the gradients of both sides.
"""

import torch
from measure import Result, alternate, parser, ratio, report, table
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from mmcl.losses import info_nce


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=2048, help="N, pairs in the batch (default: 2048)")
    arguments.add_argument("--dim", type=int, default=512, help="D, embedding size (default: 512)")
    args = arguments.parse_args()

    torch.manual_seed(0)
    x, y = (normalize(torch.randn(args.rows, args.dim), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    inputs = (x, y, scale)
    clip_loss = ClipLoss()

    def ours() -> list[Tensor]:
        return with_gradients(info_nce(x, y, scale), inputs)

    def theirs() -> list[Tensor]:
        loss = clip_loss(x, y, scale)
        assert isinstance(loss, Tensor)
        return with_gradients(loss, inputs)

    for mine, other in zip(ours(), theirs(), strict=True):  # else the times compare different things
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)

    def products() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = x @ y.T
            return logits, logits @ y, logits.T @ x

    seconds = alternate({"mmcl info_nce": ours, "open_clip ClipLoss": theirs, "floor: products": products}, args.rounds)
    print(f"N={args.rows} D={args.dim} fp32, forward and backward, {torch.get_num_threads()} threads")
    print(table(seconds, "floor: products", args.rows, "pairs"))
    value = ratio(seconds, "mmcl info_nce", "open_clip ClipLoss")
    report({"info_nce_time_over_clip_loss": Result(value=value, target=1.05, better="lower")}, args.json)


def with_gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The loss and its gradients."""
    return [loss, *torch.autograd.grad(loss, inputs)]


if __name__ == "__main__":
    main()

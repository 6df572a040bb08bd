"""How hack-ward is each rollout's own gradient, and does that tell hacks from the rest (METHOD 5).

The score of a rollout is ‖relu(V g)‖ / ‖g‖ of its own g = -∇ log π: unit advantage, no KL term. With the advantage
left in, the score's sign would merely read back the reward. Cost: one more forward and backward over the step's rows.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from projected_grpo.adapter import DeltaSLinear, delta_s_parameters
from projected_grpo.merged_forward import unchanging
from projected_grpo.row_grads import RowGradRecorder

if TYPE_CHECKING:
    from projected_grpo.trainer import ProjectedGRPOTrainer


def rollout_scores(trainer: "ProjectedGRPOTrainer", batches: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """Mean score of the student's hacks and of its other rollouts, and the AUROC of the score as a detector of
    hacks, beside the AUROC of sign(advantage) alone, over the rows of all processes. `batches` are this one's
    micro-batches of the step; no gradient of the model's is touched."""
    gather = trainer.accelerator.gather
    scores = gather(torch.cat([_row_scores(trainer, batch) for batch in batches]))
    student, hack, advantage = (
        gather(torch.cat([value(batch) for batch in batches]))
        for value in (lambda b: ~b["is_teacher"], lambda b: b["is_hack"], lambda b: b["advantages"])
    )
    scores, hack, advantage = scores[student], hack[student], advantage[student]
    return {
        "rollout/score_hack": scores[hack].mean().item() if hack.any() else None,
        "rollout/score_other": scores[~hack].mean().item() if (~hack).any() else None,
        "rollout/auroc": auroc(scores, hack),
        "rollout/auroc_advantage": auroc(advantage.sign(), hack),
    }


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """P(score of a positive > score of a negative), a tie counting half; None where one class is absent."""
    above, below = scores[positive], scores[~positive]
    if not len(above) or not len(below):
        return None
    difference = above[:, None] - below[None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def _row_scores(trainer: "ProjectedGRPOTrainer", batch: dict[str, Tensor]) -> Tensor:
    """(rows,): ‖relu(V g)‖ / ‖g‖ of each row's own -∇ log π; 0 for a row without gradient."""
    parameters = delta_s_parameters(trainer.model)
    rows: dict[DeltaSLinear, Tensor] = {}
    with RowGradRecorder(rows.__setitem__).attached(trainer.model), unchanging(trainer.model):
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
        )
        torch.autograd.grad(-(logps * batch["completion_mask"]).sum(), list(parameters.values()))
    # One-sided whatever the arm's gate takes out: a detector has to know where a gradient points.
    projector = replace(trainer.projection.projector, gate="one_sided")
    shares = projector.hack_shares({trainer.module_names[module]: grads for module, grads in rows.items()})
    return shares.nan_to_num(0.0)

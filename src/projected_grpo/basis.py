"""The `v_hack` basis: per module, the directions in `delta_s` space along which hacking pairs pull the gradient.

D (n_pairs, r) holds the pairs' GRPO gradients of one module; its top k right singular vectors, turned hack-ward, are
the rows of V (k, r). The optimiser steps along -g, so g·v > 0 for a row v means: this step makes hacking likelier.
One noise floor for all modules drops weak axes: the global quantile `drop_bottom_frac` of all kept singular values. A
floor per module would let a noisy module keep a top direction of its own, which is to project noise.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from projected_grpo.adapter import delta_s_modules, delta_s_parameters
from projected_grpo.config import TokenReduction
from projected_grpo.errors import InputError
from projected_grpo.models import model_fingerprint
from projected_grpo.pair_gradients import EncodedPair, encode_pairs, pair_gradients
from projected_grpo.paths import replacing
from projected_grpo.svd import fingerprint_mismatch
from projected_grpo.version import code_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import GRPOTrainer

    from projected_grpo.pairs import PairSet

FILE_FORMAT = "2"
DEFAULT_TOP_K = 12
DEFAULT_DROP_BOTTOM_FRAC = 0.25


@dataclass(frozen=True)
class BasisInfo:
    """How a basis came about: everything needed to judge it and to make it again, beside the tensors."""

    kind: str = "real"
    pair_set: str = ""
    pair_set_sha256: str = ""
    n_pairs: int = 0
    model: str = ""
    model_fingerprint: str = ""
    top_k: int = 0
    drop_bottom_frac: float = 0.0
    floor: float = 0.0
    token_reduction: str = "sum"
    temperature: float = 1.0
    dtype: str = "float32"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    delta_norm: float = 0.0
    """Joint norm of δ where it was extracted: 0 is the untouched model."""
    seed: int | None = None
    code_version: str = field(default_factory=code_version)


@dataclass(frozen=True)
class Overlap:
    """How much of the basis that it replaces a new one keeps (METHOD 7)."""

    mean: float | None  # mean over shared modules of ‖V_new V_oldᵀ‖_F² / min(k_new, k_old); None without any
    null: float | None  # its value for random subspaces: max(k_new, k_old) / r
    n_came: int
    n_went: int


@dataclass(frozen=True)
class HackBasis:
    """Per projected module, by its name in the base model; modules in one fixed order in every mapping.

    directions: V (k, r), orthonormal rows, oriented hack-ward, float32.
    singular_values: (k,), of the kept axes.
    coefficients: (n_pairs, k), D Vᵀ.
    spectrum: (min(n_pairs, r),), all singular values of D, also for modules without a kept axis.
    fingerprints: 160 bytes, the decomposition that the coordinates belong to.
    """

    directions: dict[str, Float[Tensor, "k r"]]
    singular_values: dict[str, Float[Tensor, " k"]]
    coefficients: dict[str, Float[Tensor, "n k"]]
    spectrum: dict[str, Float[Tensor, " m"]]
    fingerprints: dict[str, UInt8[Tensor, "160"]]
    info: BasisInfo = field(default_factory=BasisInfo)

    @classmethod
    def extract(
        cls,
        trainer: "GRPOTrainer",
        pairs: "PairSet",
        top_k: int = DEFAULT_TOP_K,
        drop_bottom_frac: float = DEFAULT_DROP_BOTTOM_FRAC,
        token_reduction: TokenReduction = "sum",
    ) -> "HackBasis":
        """Basis of the trainer's own model; temperature, chat template and lengths are read from the trainer."""
        return cls.extract_from_model(
            trainer.model,
            trainer.processing_class,
            pairs,
            temperature=trainer.temperature,
            chat_template_kwargs=trainer.chat_template_kwargs,
            max_completion_length=trainer.max_completion_length,
            top_k=top_k,
            drop_bottom_frac=drop_bottom_frac,
            token_reduction=token_reduction,
        )

    @classmethod
    def extract_from_model(
        cls,
        model: nn.Module,
        tokenizer: "PreTrainedTokenizerBase",
        pairs: "PairSet",
        *,
        temperature: float,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        top_k: int = DEFAULT_TOP_K,
        drop_bottom_frac: float = DEFAULT_DROP_BOTTOM_FRAC,
        token_reduction: TokenReduction = "sum",
        like: "HackBasis | None" = None,
        model_name: str | None = None,
        fingerprint: str | None = None,
        encoded: Sequence[EncodedPair] | None = None,
    ) -> "HackBasis":
        """Basis of a model that wears one active `delta_s` adapter, on the policy as it stands.

        With `like`, the modules and the k of each are taken from that basis and there is no floor: a control's form.
        `model_name`: as people know the model, by default where it was loaded from. What is known already need not be
        found out again: `fingerprint` is the model's, `encoded` the pairs' ids.

        Raises:
            InputError: `top_k` exceeds the number of pairs, a pair is too long, the pairs have no gradient.
        """
        if like is None:
            check_top_k(top_k, len(pairs))
        if encoded is None:
            encoded = encode_pairs(
                model, tokenizer, pairs.pairs, chat_template_kwargs, max_prompt_length, max_completion_length
            )
        grads = pair_gradients(model, encoded, temperature=temperature, token_reduction=token_reduction)
        info = BasisInfo(
            pair_set=pairs.name,
            pair_set_sha256=pairs.sha256,
            n_pairs=len(pairs),
            model=model_name or getattr(model.config, "_name_or_path", ""),
            model_fingerprint=fingerprint or model_fingerprint(model),
            token_reduction=token_reduction,
            temperature=temperature,
            chat_template_kwargs=chat_template_kwargs or {},
            delta_norm=sum(p.detach().double().square().sum().item() for p in delta_s_parameters(model).values())
            ** 0.5,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        )
        fingerprints = {name: module.fingerprint for name, module in delta_s_modules(model).items()}
        return cls.from_pair_gradients(grads, fingerprints, info, top_k, drop_bottom_frac, like)

    @classmethod
    def from_pair_gradients(
        cls,
        pair_grads: Mapping[str, Float[Tensor, "n r"]],
        fingerprints: Mapping[str, UInt8[Tensor, "160"]],
        info: BasisInfo,
        top_k: int = DEFAULT_TOP_K,
        drop_bottom_frac: float = DEFAULT_DROP_BOTTOM_FRAC,
        like: "HackBasis | None" = None,
    ) -> "HackBasis":
        """Basis out of the pairs' gradients: thin SVD, top k, one floor for all modules, orientation."""
        svds = {name: torch.linalg.svd(grads.double(), full_matrices=False) for name, grads in pair_grads.items()}
        if like is None:
            kept = [svd.S[:top_k] for svd in svds.values()]
            floor = torch.cat(kept).quantile(drop_bottom_frac).item() if kept else 0.0
            n_axes = {
                name: int(((s >= floor) & (s > _rounding(pair_grads[name], s))).sum())
                for name, s in zip(svds, kept, strict=True)
            }
            info = replace(info, top_k=top_k, drop_bottom_frac=drop_bottom_frac, floor=floor)
        else:
            n_axes = {name: like.directions[name].shape[0] if name in like.directions else 0 for name in svds}
            for name, k in n_axes.items():
                if k > len(svds[name].S):
                    raise InputError(
                        f"pair set {info.pair_set!r} gives {len(svds[name].S)} directions at {name}, where the real "
                        f"basis has {k}; a placebo needs as many pairs as the real set"
                    )
            info = replace(info, kind=info.pair_set, top_k=like.info.top_k, drop_bottom_frac=0.0, floor=0.0)
        if not any(n_axes.values()):
            raise InputError(
                f"pair set {info.pair_set!r} gives no gradient on any module, so there is no direction to keep; check "
                "that hack and clean sides differ"
            )
        directions, singular_values, coefficients = {}, {}, {}
        for name, k in n_axes.items():
            if k == 0:
                continue
            rows = svds[name].Vh[:k]
            directions[name], coefficients[name] = orient(rows, pair_grads[name].double() @ rows.T)
            singular_values[name] = svds[name].S[:k].float()
        return cls(
            directions,
            singular_values,
            coefficients,
            {name: svd.S.float() for name, svd in svds.items()},
            {name: fingerprints[name] for name in directions},
            info,
        )

    @property
    def n_axes(self) -> int:
        """Kept (module, axis) pairs."""
        return sum(v.shape[0] for v in self.directions.values())

    def check_fits(self, model: nn.Module) -> None:
        """Refuse a model whose modules or decompositions are not the ones that the basis was made over.

        Raises:
            InputError: names the first module that does not fit, and why.
        """
        modules = delta_s_modules(model)
        for name, directions in self.directions.items():
            if name not in modules:
                why = "the model does not adapt that module"
            elif directions.shape[1] != modules[name].u.shape[1]:
                why = f"r is {directions.shape[1]} in the basis and {modules[name].u.shape[1]} in the model"
            else:
                why = fingerprint_mismatch(self.fingerprints[name], modules[name].fingerprint)
            if why is not None:
                raise InputError(
                    f"the basis (model {self.info.model or 'unnamed'}) does not fit this model at {name}: {why}; "
                    "extract a basis from this model"
                )

    def overlap(self, old: "HackBasis") -> Overlap:
        """Overlap with the basis that this one replaces, and its null for random subspaces."""
        shared = [name for name in self.directions if name in old.directions]
        shares, nulls = [], []
        for name in shared:
            new, before = self.directions[name].double(), old.directions[name].double()
            k_small, k_large = sorted((new.shape[0], before.shape[0]))
            shares.append(((new @ before.T).square().sum() / k_small).item())
            nulls.append(k_large / new.shape[1])
        return Overlap(
            mean=sum(shares) / len(shares) if shared else None,
            null=sum(nulls) / len(nulls) if shared else None,
            n_came=len(self.directions) - len(shared),
            n_went=len(old.directions) - len(shared),
        )

    def save(self, path: Path | str) -> None:
        """Write the one file that holds the basis, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for part in ("directions", "singular_values", "coefficients", "spectrum", "fingerprints"):
            tensors |= {f"{part}/{name}": tensor.contiguous() for name, tensor in getattr(self, part).items()}
        # One key: safetensors writes several in no fixed order, and equal bases should be equal files.
        about = {
            "format": FILE_FORMAT,
            "info": asdict(self.info),
            "modules": list(self.directions),
            "all_modules": list(self.spectrum),
            "checksum": _checksum(tensors),
        }
        path = Path(path)
        with replacing(path) as scratch:
            save_file(tensors, scratch, metadata={"basis": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str) -> "HackBasis":
        """Read a basis file.

        Raises:
            InputError: there is no such file, or it is no basis file, or one of another format.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"basis file {path} does not exist; write one with `projected-grpo extract --out {path}`")
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["basis"])
                if about["format"] != FILE_FORMAT:
                    raise InputError(
                        f"basis file {path} has format {about['format']!r}, this version reads {FILE_FORMAT!r}; "
                        "extract the basis again"
                    )
                # Cloned: the file's own memory is not aligned as torch's is, and a product rounds by alignment.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            if about["checksum"] != _checksum(tensors):
                raise InputError(f"basis file {path} is damaged (checksum); extract it again")

            def part(name: str, modules: list[str]) -> dict[str, Tensor]:
                return {module: tensors[f"{name}/{module}"] for module in modules}

            modules = about["modules"]
            return cls(
                part("directions", modules),
                part("singular_values", modules),
                part("coefficients", modules),
                part("spectrum", about["all_modules"]),
                part("fingerprints", modules),
                BasisInfo(**about["info"]),
            )
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"basis file {path} is damaged or no basis file ({error}); extract it again") from error


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _rounding(pair_grads: Float[Tensor, "n r"], s: Float[Tensor, " k"]) -> float:
    """Singular values up to this are rounding: beyond D's rank an axis has no direction, whatever the floor."""
    return s[0].item() * max(pair_grads.shape) * torch.finfo(torch.float64).eps


def orient(
    directions: Float[Tensor, "k r"], coefficients: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "k r"], Float[Tensor, "n k"]]:
    """Turn each row so that most pairs have a positive coefficient on it; a tie goes by the sign of the mean.

    Returns the rows and their coefficients, both turned, both float32.
    """
    votes = coefficients.sign().sum(0)
    votes = torch.where(votes == 0, coefficients.mean(0), votes)
    sign = torch.where(votes < 0, -1.0, 1.0).to(directions.dtype)
    return plain(directions * sign[:, None]), plain(coefficients * sign)


def plain(x: Tensor) -> Tensor:
    """`x` in float32, in the layout in which a file gives it back: in another one the same product rounds otherwise."""
    return x.float().clone(memory_format=torch.contiguous_format)


def check_top_k(top_k: int, n_pairs: int) -> None:
    """Refuse a k that the pairs cannot fill: D has at most `n_pairs` right singular vectors."""
    if not 1 <= top_k <= n_pairs:
        raise InputError(
            f"--v-hack-k {top_k} is out of range: {n_pairs} pairs allow 1 to {n_pairs}; lower it or add pairs"
        )

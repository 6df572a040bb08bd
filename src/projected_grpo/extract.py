"""From a model and its pairs to a basis file: the `extract` command, and where the arms get their directions."""

from dataclasses import dataclass, field

import torch
from loguru import logger
from peft import PeftModel

from projected_grpo.basis import HackBasis, check_top_k
from projected_grpo.config import BasisOptions, ExtractConfig
from projected_grpo.controls import flipped_basis, random_basis
from projected_grpo.errors import InputError
from projected_grpo.models import load_model, model_fingerprint
from projected_grpo.pair_gradients import EncodedPair, encode_pairs
from projected_grpo.pairs import PairSet, select
from projected_grpo.paths import check_out
from projected_grpo.prompting import Prompter
from projected_grpo.saved_adapter import adapted, check_adapter
from projected_grpo.sources import pairs_named, pairs_selected, placebo_of

SHARE_AT = (1, 2, 4, 8, 12, 24)


@dataclass
class PairBases:
    """The bases of one model and one set of options, on the policy as it stands when asked.

    `first`: a basis that was read from a file, which stands for the first real one.
    """

    model: PeftModel
    prompter: Prompter
    options: BasisOptions
    max_completion_length: int | None = None
    first: HackBasis | None = None
    seed: int = field(init=False)
    fingerprint: str = field(init=False)
    _encoded: dict[str, list[EncodedPair]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.seed = self.options.seed
        self.fingerprint = model_fingerprint(self.model)

    def real(self) -> HackBasis:
        if self.first is not None:
            basis, self.first = self.first, None
            return basis
        return self._extract(pairs_of(self.options), like=None)

    def placebo(self, real: HackBasis, kind: str) -> HackBasis:
        return self._extract(placebos_of(self.options, kind), like=real)

    def encoded(self, pairs: PairSet) -> list[EncodedPair]:
        """The ids of the pairs in this model's style, made once: a refresh comes back for the same pairs."""
        if pairs.sha256 not in self._encoded:
            self._encoded[pairs.sha256] = encode_pairs(
                self.model,
                self.prompter.loaded.tokenizer,
                self.prompter.pairs(pairs).pairs,
                self.prompter.template_kwargs,
                self.options.max_prompt_length,
                self.max_completion_length,
            )
        return self._encoded[pairs.sha256]

    def _extract(self, pairs: PairSet, like: HackBasis | None) -> HackBasis:
        return HackBasis.extract_from_model(
            self.model,
            self.prompter.loaded.tokenizer,
            pairs,
            temperature=self.options.temperature,
            chat_template_kwargs=self.prompter.template_kwargs,
            encoded=self.encoded(pairs),
            top_k=self.options.v_hack_k,
            drop_bottom_frac=self.options.drop_bottom_frac,
            token_reduction=self.options.token_reduction,
            like=like,
            model_name=self.prompter.loaded.name,
            fingerprint=self.fingerprint,
        )


def pairs_of(options: BasisOptions) -> PairSet:
    """The configured pairs."""
    return pairs_selected(options.pairs, options.pairs_without, options.n_pairs, options.pairs_seed)


def placebos_of(options: BasisOptions, kind: str) -> PairSet:
    """The placebo set of a kind, as many pairs of it as the configured set has: a control needs as many."""
    wanted = len(pairs_of(options))
    placebo = pairs_named(placebo_of(options.pairs, kind))
    if len(placebo) < wanted:
        raise InputError(
            f"placebo set {placebo.name!r} has {len(placebo)} pairs, the real set {wanted}, and a control needs as "
            f"many; set --n-pairs {len(placebo)} for both"
        )
    return select(placebo, n=wanted, seed=0)


def extract(config: ExtractConfig) -> HackBasis:
    """Write the basis, or the control of one, that `config` asks for, and print its table."""
    check_out(config.out, config.overwrite)
    real, older = (HackBasis.load(path) if path is not None else None for path in (config.like, config.compare))
    if config.adapter is not None:
        check_adapter(config.adapter)
    check_top_k(config.v_hack_k, len(pairs_of(config)))
    loaded = load_model(config.model, config.dtype, config.device)
    bases = PairBases(adapted(loaded.model, config.adapter, trainable=True), Prompter(loaded), config)
    for given in filter(None, (real, older)):
        given.check_fits(bases.model)
    if config.control == "random":
        basis = random_basis(real, config.seed)
    elif config.control == "flipped":
        basis = flipped_basis(real, config.seed)
    elif real is not None:
        basis = bases.placebo(real, config.control.removeprefix("placebo_"))
    else:
        basis = bases.real()
    basis.save(config.out)
    logger.info("\n" + describe(basis))
    if older is not None:
        overlap = basis.overlap(older)
        shared = (
            "no module in common" if overlap.mean is None else f"{overlap.mean:.3f} (unrelated: {overlap.null:.3f})"
        )
        logger.info(f"overlap with {config.compare}: {shared}, {overlap.n_came} modules came, {overlap.n_went} went")
    logger.info(f"wrote {config.out}" + (f" ({loaded.note})" if loaded.note else ""))
    return basis


def describe(basis: HackBasis) -> str:
    """A table of modules and axes kept, the singular values, and the share of ‖D‖² that the top k explain."""
    info = basis.info
    values = torch.cat(list(basis.singular_values.values()))
    quartiles = values.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    lines = [
        f"{info.kind} basis of {info.model or 'the model'} from {info.n_pairs} pairs of {info.pair_set!r}",
        f"  modules kept   {len(basis.directions)} of {len(basis.spectrum)}",
        f"  axes kept      {basis.n_axes} of {_n_candidates(basis)} (k {info.top_k}, "
        f"drop_bottom_frac {info.drop_bottom_frac}, floor {info.floor:.3g})",
        "  singular values, kept: " + "  ".join(f"{q:.3g}" for q in quartiles) + "   (min, quartiles, max)",
        f"  {'kind of module':<16}{'modules':>8}{'axes':>6}" + "".join(f"{f'top {k}':>8}" for k in SHARE_AT),
    ]
    for kind in sorted({name.rpartition(".")[2] for name in basis.spectrum}):
        names = [name for name in basis.spectrum if name.rpartition(".")[2] == kind]
        axes = sum(len(basis.singular_values.get(name, ())) for name in names)
        energy = [basis.spectrum[name].double().square() for name in names]
        total = sum(e.sum().item() for e in energy)
        shares = [sum(e[:k].sum().item() for e in energy) / total if total else 0.0 for k in SHARE_AT]
        kept = sum(name in basis.directions for name in names)
        lines.append(f"  {kind:<16}{kept:>8}{axes:>6}" + "".join(f"{share:>8.0%}" for share in shares))
    return "\n".join(lines)


def _n_candidates(basis: HackBasis) -> int:
    return sum(min(basis.info.top_k, len(s)) for s in basis.spectrum.values())

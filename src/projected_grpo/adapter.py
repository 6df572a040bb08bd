"""The `delta_S` adapter: a PEFT tuner that steers the spectrum of a frozen linear layer and nothing else.

    y = x Wᵀ + b + ((x Vhᵀ) ∘ δ) Uᵀ,  so the effective weight is W + U diag(δ) Vh,  W = U diag(S) Vh.

δ (`delta_s`, shape (r,), r = min(d_out, d_in)) is zero at the start: the adapted model is the base model bit for bit,
and so it is again under `disable_adapter()` after training, which gives the KL term its reference policy for free.
    dL/dδᵢ = Σ_tokens (Uᵀ dL/dy)ᵢ (Vh x)ᵢ
The singular vectors stay as they are and only the spectrum moves, as in AntiPaSTO; PiSSA (arXiv:2404.02948) trains the
vectors instead. The plain forward, two extra matmuls in float32, is the reference; what runs is `merged_forward.py`.

Left out on purpose: dropout, trained biases, Conv1D and quantised layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
)
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from projected_grpo.merged_forward import EffectiveWeight, Form, effective_weight, merged_linear
from projected_grpo.peft_registration import register
from projected_grpo.svd import (
    Factors,
    factors_of,
    fingerprint_mismatch,
    pack_fingerprint,
    probe_factors,
    svd_factors,
)

if TYPE_CHECKING:
    from projected_grpo.deferral import DeferredGrads
    from projected_grpo.row_grads import RowGradRecorder

PEFT_NAME = "DELTA_S"


@dataclass
class DeltaSConfig(PeftConfig):
    """Which linear layers get a `delta_s`. The defaults are the method's: all of them but the LM head."""

    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={"help": "Names, a regular expression, or 'all-linear' (every linear layer but the LM head)."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Not supported: only delta_s is trained. Must stay None."}
    )
    form: Form = field(
        default="merged",
        metadata={"help": "How the forward is computed: 'merged' (one matmul), or 'plain' (three, its reference)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_NAME)
        if self.modules_to_save:
            raise ValueError(
                f"modules_to_save={self.modules_to_save} is not supported by DeltaSConfig: delta_s is the only trained "
                "parameter; leave modules_to_save out."
            )
        if self.form not in get_args(Form):
            raise ValueError(f"form={self.form!r} is unknown to DeltaSConfig; use one of {', '.join(get_args(Form))}")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))


class FingerprintDict(BufferDict):
    """The fingerprint under which each adapter was trained, all equal to `here`, that of this module: an adapter of
    another decomposition is refused whichever way it comes in, copied (PEFT) or set in place (Transformers)."""

    def __init__(self, here: UInt8[Tensor, "160"]) -> None:
        super().__init__({}, persistent=True)
        self.here = here

    def check(self, adapter_name: str, saved: Tensor, module_name: str) -> None:
        why = fingerprint_mismatch(saved, self.here)
        if why is not None:
            raise ValueError(
                f"adapter {adapter_name!r} does not fit {module_name}: {why}; load it over the model and dtype that it "
                "was trained on"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name in self._buffers:
            self.check(name, value, "this model")
        super().__setattr__(name, value)


class DeltaSLinear(nn.Module, BaseTunerLayer):
    """A frozen `nn.Linear` with one `delta_s` per adapter over one shared pair of factors `u`, `vh`."""

    u: Float[Tensor, "d_out r"]
    vh: Float[Tensor, "r d_in"]
    fingerprint: UInt8[Tensor, "160"]
    set_adapter: Any  # of BaseTunerLayer, which mypy does not follow

    adapter_layer_names = ("delta_s",)
    other_param_names = ("delta_s_fingerprint",)

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, config: DeltaSConfig, factors: Factors | None = None
    ) -> None:
        """`factors`: those of the layer's weight, where they are there already."""
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.delta_s = nn.ParameterDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged_weight: Tensor | None = None
        self.form = config.form
        self.effective: EffectiveWeight | None = None  # the last forward's weight, while δ is what it was
        self.unchanging = False  # set while nobody changes δ
        self.recorder: RowGradRecorder | None = None
        self.deferred: DeferredGrads | None = None
        factors = svd_factors(base_layer.weight) if factors is None else factors
        dtype, device = torch.promote_types(base_layer.weight.dtype, torch.float32), base_layer.weight.device
        self._host_factors: tuple[Tensor, Tensor] | None = None
        # No buffers: DDP would send them out before each forward, and hold on to them while they are offloaded.
        self.u, self.vh = (x.to(device, dtype) for x in (factors.u, factors.vh))
        self.fingerprint = pack_fingerprint(factors.weight_hash, probe_factors(self.u, self.vh))
        self.delta_s_fingerprint = FingerprintDict(self.fingerprint)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: DeltaSConfig) -> None:
        """Add the adapter `adapter_name` with δ = 0, in float32 (float64 over a float64 weight).

        Raises ValueError for another `form` than the layer's first adapter has.
        """
        if config.form != self.form:
            raise ValueError(f"adapter {adapter_name!r} has form={config.form!r}, the layer's first one {self.form!r}")
        self.delta_s[adapter_name] = nn.Parameter(
            torch.zeros(self.u.shape[1], dtype=self.u.dtype, device=self.u.device)
        )
        self.delta_s_fingerprint[adapter_name] = self.fingerprint.clone()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def active_delta_s(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.delta_s]

    def delta_s_sum(self, adapter_names: Sequence[str]) -> Float[Tensor, " r"]:
        return torch.stack([self.delta_s[name] for name in adapter_names]).sum(0)

    def get_delta_weight(self, adapter: str) -> Float[Tensor, "d_out d_in"]:
        """U diag(δ) Vh in the factors' precision."""
        return (self.u * self.delta_s[adapter]) @ self.vh

    @property
    def unmerged_weight(self) -> Float[Tensor, "d_out d_in"]:
        """W, also while something is merged into it."""
        return self.base_layer.weight.data if self._unmerged_weight is None else self._unmerged_weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + U diag(δ) Vh in W's place. W itself is kept, so that `unmerge` is exact, at one more copy of W.

        The merged weight is the copy that the forward multiplies by as long as δ stays as it is: whoever changes it in
        place changes that too.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.delta_s]
        if not names:
            return
        weight, together = self.base_layer.weight, [*self.merged_adapters, *names]
        merged = effective_weight(self, together, self.delta_s_sum(together), weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"merging adapter {', '.join(names)} gives NaN or infinity; its delta_s is broken")
        if self._unmerged_weight is None:
            self._unmerged_weight = weight.data
        # The kept copy itself, and never W's own memory.
        weight.data = merged.clone() if merged.data_ptr() == self.unmerged_weight.data_ptr() else merged
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the kept W back."""
        if self._unmerged_weight is not None:
            self.base_layer.weight.data = self._unmerged_weight.to(self.base_layer.weight)
            self._unmerged_weight = None
        self.merged_adapters.clear()

    def offload(self) -> None:
        """Move to host memory what a merged adapter does not need, the factors and W, until `restore`."""
        if self._unmerged_weight is None:
            raise ValueError("only a merged adapter can be offloaded: without its factors it cannot be computed")
        if self._host_factors is None:  # they never change
            self._host_factors = _host_copy(self.u), _host_copy(self.vh)
        self.u, self.vh = (x[:0] for x in self._host_factors)
        kept = self.effective
        if kept is not None and kept.weight.data_ptr() == self._unmerged_weight.data_ptr():
            self.effective = None  # at δ = 0 it is W, and would hold its memory
        self._unmerged_weight = _host_copy(self._unmerged_weight)

    def restore(self) -> None:
        """Bring back what `offload` has moved."""
        if self._host_factors is not None and not len(self.u):
            device = self.base_layer.weight.device
            self.u, self.vh = (x.to(device, copy=True, non_blocking=True) for x in self._host_factors)
            if self._unmerged_weight is not None:  # `disable_adapter` unmerges
                self._unmerged_weight = self._unmerged_weight.to(device, non_blocking=True)
                if self.effective is not None:
                    self.effective = self.effective.of_moved(self._unmerged_weight)

    def forward(self, x: Float[Tensor, "*batch d_in"], *args: Any, **kwargs: Any) -> Float[Tensor, "*batch d_out"]:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self.active_delta_s
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if self.form == "merged" and not args and not kwargs and self._base_is_bare():
            return merged_linear(self, x, active)
        result = self.base_layer(x, *args, **kwargs)
        # Outside autocast, in the factors' precision: δ is small beside S, and bfloat16 would round much of it away.
        with torch.autocast(x.device.type, enabled=False):
            delta = self.delta_s_sum(active)
            if self.recorder is not None and torch.is_grad_enabled() and delta.requires_grad:
                delta = self.recorder.expand(self, delta, x)
            steered = F.linear(F.linear(x.to(self.vh.dtype), self.vh) * delta, self.u)
        return result + steered.to(result.dtype)

    def _base_is_bare(self) -> bool:
        """Whoever has hooked the base layer wants to see it called, and who trains its weight wants a gradient."""
        base = self.base_layer
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        return not (any(hooks) or hasattr(base, "_hf_hook") or trained)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "effective": None}

    def _apply(self, fn, recurse: bool = True):
        self.effective = None  # memory that W gives back here may hold the next W
        if self._unmerged_weight is not None:
            self._unmerged_weight = fn(self._unmerged_weight)

        # `model.to(bfloat16)` casts the base layer; δ, its gradient and its coordinates stay as precise as they are.
        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        self.u, self.vh = move(self.u), move(self.vh)
        if recurse:
            self.base_layer._apply(fn)
            self.delta_s._apply(move)
            self.delta_s_fingerprint._apply(move)
        return super()._apply(move, recurse=False)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Linear) -> tuple[torch.device, torch.dtype]:
        # PEFT casts what it loads with low_cpu_mem_usage to this dtype, and δ stays as precise as its coordinates.
        return base_layer.weight.device, self.u.dtype

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in self.delta_s:
            saved = state_dict.get(f"{prefix}delta_s_fingerprint.{name}")
            if saved is not None:
                self.delta_s_fingerprint.check(name, saved, f"module {prefix.removesuffix('.')}")
            elif f"{prefix}delta_s.{name}" in state_dict:
                raise ValueError(
                    f"adapter {name!r} has no fingerprint for module {prefix.removesuffix('.')}, so it cannot be told "
                    "whether it was trained over these factors; save it again with save_pretrained"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "delta_s." + super().__repr__()


class DeltaSModel(BaseTuner):
    """The tuner: swaps the targeted `nn.Linear` modules of a model for `DeltaSLinear`."""

    prefix = "delta_s"
    tuner_layer_cls = DeltaSLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_model(self, peft_config: DeltaSConfig, model: nn.Module) -> None:
        """Decompose what is going to be adapted in one go. PEFT comes here before it expands `all-linear`."""
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        ours = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, DeltaSLinear))
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(ours) and self._check_target_module_exists(peft_config, name)
        }
        for name, module in targets.items():
            self._refuse_head(module, name)
        self._factors = factors_of({name: m.weight for name, m in targets.items() if type(m) is nn.Linear})

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(*args, **kwargs)
        self._factors = {}  # of what was targeted by name and then not adapted

    def _refuse_head(self, target: nn.Module, name: str) -> None:
        get: Any = getattr(self.model, "get_output_embeddings", None)
        head = None if get is None else get()
        if head is not None and (target is head or getattr(target, "base_layer", None) is head):
            raise ValueError(
                f"target module {name} is the LM head, which delta_s leaves alone (its log-probabilities are "
                "computed from the head's weight directly); take it out of target_modules"
            )

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_) -> None:
        self._refuse_head(target, current_key)
        if isinstance(target, DeltaSLinear):
            target.update_layer(adapter_name, peft_config)
            return
        if type(target) is not nn.Linear:
            raise ValueError(
                f"target module {current_key} is a {type(target).__name__}; delta_s supports nn.Linear only, so name "
                "other target_modules or exclude it"
            )
        module = DeltaSLinear(target, adapter_name, peft_config, self._factors.pop(current_key, None))
        if adapter_name not in self.active_adapters:
            module.requires_grad_(False)
        self._replace_module(parent, target_name, module, target)


def _host_copy(x: Tensor) -> Tensor:
    """In pinned memory, where there is a GPU: it comes back at the bus's full speed."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x)


register(PEFT_NAME, DeltaSConfig, DeltaSModel)


def delta_s_modules(model: nn.Module) -> dict[str, DeltaSLinear]:
    """The adapted modules by the name that they have in the base model, in the model's own order."""
    return {
        name.removeprefix("module.").removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, DeltaSLinear)
    }


def delta_s_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained δ of each adapted module: that of its one active adapter.

    Raises:
        ValueError: the model has no `delta_s`, or several adapters are active at once.
    """
    modules = delta_s_modules(model)
    if not modules:
        raise ValueError("the model has no delta_s adapter; wrap it with get_peft_model(model, DeltaSConfig()) first")
    parameters = {}
    for name, module in modules.items():
        active = [adapter for adapter in module.active_adapters if adapter in module.delta_s]
        if len(active) != 1:
            raise ValueError(f"module {name} has {len(active)} active delta_s adapters, but the method trains one")
        parameters[name] = module.delta_s[active[0]]
    return parameters

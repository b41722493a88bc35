"""Networks of torchvision and timm as backbones: features of stride 4 to 32, found by trying the network.

The network keeps the library's names and structure below ``trunk``, so that the library's files load by a
prefix. What only its classifier needs is cut off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import record_function
from torchvision.models.feature_extraction import create_feature_extractor

from ..config.schema import LIBRARY_BACKBONES
from ..errors import UserError
from ..layers import GroupNorm, GroupNormAct, WSConv2d, frozen_norm
from .resnet import STAGES, NormFactory

if TYPE_CHECKING:
    from ..config import Config

# Height and width of the image on which a network is tried: multiples of 32, and not both of 64, which some
# networks round images up to.
TRIAL = (64, 96)

# A container of modules whose outputs have so many strides is the network itself, and not a stage of it.
_TRUNK_STRIDES = 3

INSTALL_TIMM = 'pip install "gn-detect[timm]"'


class LibraryBackbone(nn.Module):
    """A network of torchvision or timm that returns ``{"res2": (N, C, H / 4, W / 4), ...}``.

    Args:
        trunk: the network, without what the features do not need.
        run: computes the features of ``names`` from the trunk and images (N, 3, H, W).
        names: of the features, ``res2`` for stride 4 to ``res5`` for stride 32.
        model: name of the network in its library.
    """

    def __init__(
        self,
        trunk: nn.Module,
        run: Callable[[nn.Module, Tensor], list[Tensor]],
        names: tuple[str, ...],
        model: str,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.run = run
        self.names = names
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to the features named in ``names``."""
        with record_function("backbone"):
            return dict(zip(self.names, self.run(self.trunk, x), strict=True))


@dataclass(frozen=True)
class _Intermediates:
    """Computes the features ``indices`` of a timm network. An object, so that models can be copied."""

    indices: tuple[int, ...]

    def __call__(self, trunk: Any, x: Tensor) -> list[Tensor]:
        found = trunk.forward_intermediates(
            x, indices=list(self.indices), intermediates_only=True, output_fmt="NCHW"
        )
        return list(found)


def _outputs(trunk: nn.Module, x: Tensor) -> list[Tensor]:
    """Compute the features of a network that :func:`create_feature_extractor` made."""
    return list(trunk(x).values())


def find_library(name: str) -> tuple[str, str]:
    """Return the library and the network of ``timm/NAME``, ``torchvision/NAME``, or a bare name.

    A bare name is torchvision's if that has it, otherwise timm's.

    Raises:
        UserError: there is no such network; the message gives near names.
    """
    library, slash, model = name.rpartition("/")
    if not slash:
        library = "torchvision" if model in _torchvision_names() or not _has_timm() else "timm"
    elif library not in ("timm", "torchvision"):
        raise UserError(
            "unknown-backbone", f"{name}: {library} is no library here; give timm/NAME or torchvision/NAME"
        )
    check_name(library, model, bare=not slash)
    return library, model


def check_name(library: str, model: str, *, bare: bool = False) -> None:
    """Refuse a name that ``library`` does not have; ``bare``: near names of both libraries are given.

    Raises:
        UserError: there is no such network, or timm is not installed.
    """
    if library == "torchvision":
        names = _torchvision_names()
        known = model in names
    else:
        timm = import_timm(f"MODEL.BACKBONE.MODEL {model}")
        names = timm.list_models()
        known = timm.is_model(model.partition(".")[0])  # of NAME.TAG; no "hf-hub:", which would download
    if known:
        return
    if bare and library == "timm":
        names = [*_torchvision_names(), *names]
    near = get_close_matches(model, names, 3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{library}'s own documentation lists them"
    without = "" if not bare or _has_timm() else f"; timm, which has more, is not installed ({INSTALL_TIMM})"
    raise UserError("unknown-backbone", f"{library} has no classifier {model!r}; {hint}{without}")


def import_timm(purpose: str) -> Any:
    """Return the module ``timm``.

    Raises:
        UserError: it is not installed; ``purpose`` begins the message.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "missing-package", f"{purpose} needs timm, which is not installed: {INSTALL_TIMM}"
        ) from error
    return timm


def _has_timm() -> bool:
    try:
        import_timm("")
    except UserError:
        return False
    return True


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def build_library_backbone(
    cfg: Config, norm: NormFactory
) -> tuple[LibraryBackbone, dict[str, tuple[int, int]]]:
    """Build the network of ``MODEL.BACKBONE.MODEL`` with random weights; nothing is downloaded.

    Args:
        cfg: its ``MODEL.BACKBONE``, and the stages of ``MODEL.RESNETS.OUT_FEATURES``.
        norm: makes a GroupNorm from its number of channels.

    Returns:
        The backbone, and the channels and stride of each feature.

    Raises:
        UserError: there is no such network, it has no features of these strides, or a key does not fit it.
    """
    settings = cfg.model.backbone
    library, model = LIBRARY_BACKBONES[settings.name], settings.model
    check_name(library, model)
    names = tuple(name for name in STAGES if name in cfg.model.resnets.out_features)
    strides = [2 ** (STAGES.index(name) + 2) for name in names]
    network = create_network(library, model, settings.drop_path_rate)
    with _trying(library, model):
        found = _locate(network)
    frozen_at = 2**settings.freeze_at if settings.freeze_at else None
    for stride in [*strides, *([frozen_at] if frozen_at else [])]:
        if stride not in found:
            has = ", ".join(map(str, found)) or "none"
            raise UserError(
                "unfit-backbone",
                f"{library}'s {model} has no feature of stride {stride} (it has {has}); take another one, "
                "leave the stage out of MODEL.RESNETS.OUT_FEATURES and MODEL.FPN.IN_FEATURES, or set "
                "MODEL.BACKBONE.FREEZE_AT to a stage that it has",
            )
    outputs = [found[stride].output for stride in strides]
    frozen = _used([found[frozen_at].output]) if frozen_at else set()
    used = _used(outputs)
    with _trying(library, model):
        trunk, run = _cut(network, [found[stride].place for stride in strides], names)
    for parameter in trunk.parameters():
        parameter.requires_grad_(parameter in used and parameter not in frozen)
    _set_norms(trunk, settings.norm, norm, frozen, f"{library}'s {model}")
    if library == "timm":
        _set_convs(trunk)
    if settings.activation_checkpointing:
        _set_checkpointing(trunk, model)
    features = {
        name: (output.shape[1], stride) for name, output, stride in zip(names, outputs, strides, strict=True)
    }
    return LibraryBackbone(trunk, run, names, model), features


def has_batch_norm(library: str, model: str) -> bool:
    """Return whether a network has BatchNorms, which ``MODEL.BACKBONE.NORM`` can replace.

    Raises:
        UserError: there is no such network, or timm is not installed.
    """
    check_name(library, model)
    with torch.device("meta"):  # no memory is taken, and no random number drawn
        network = create_network(library, model)
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def make_library_backbone(cfg: Config) -> LibraryBackbone:
    """Build the network of ``MODEL.BACKBONE.MODEL`` with the library's own norms, all trained.

    Raises:
        UserError: see :func:`build_library_backbone`.
    """
    keys = {"NORM": "keep", "FREEZE_AT": 0, "ACTIVATION_CHECKPOINTING": False}
    cfg = cfg.replace({f"MODEL.BACKBONE.{key}": value for key, value in keys.items()})
    return build_library_backbone(cfg, lambda channels: None)[0]


def create_network(library: str, model: str, drop_path_rate: float = 0.0) -> nn.Module:
    """Return the library's classifier with random weights.

    Raises:
        UserError: it has no stochastic depth, and the rate is not 0.
    """
    key = "stochastic_depth_prob" if library == "torchvision" else "drop_path_rate"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights, which are loaded later
        try:
            return _create(library, model, {key: drop_path_rate})
        except TypeError as error:
            if drop_path_rate:
                raise UserError(
                    "unfit-backbone",
                    f"{library}'s {model} has no stochastic depth; set MODEL.BACKBONE.DROP_PATH_RATE 0",
                ) from error
            return _create(library, model, {})


def _create(library: str, model: str, options: dict[str, Any]) -> nn.Module:
    if library == "timm":
        timm = import_timm(f"MODEL.BACKBONE.MODEL {model}")
        network: nn.Module = timm.create_model(model, pretrained=False, num_classes=0, **options)
        return network
    if model in ("googlenet", "inception_v3"):
        options = options | {"aux_logits": False, "init_weights": True}
    try:
        return torchvision.models.get_model(model, weights=None, **options)
    except NotImplementedError:  # RegNets compute their widths by tensors, which have no values on "meta"
        with torch.device("cpu"):
            return torchvision.models.get_model(model, weights=None, **options).to("meta")


@dataclass(frozen=True)
class _Feature:
    """The last feature of a stride: its place in the network, and its value for the trial image."""

    place: Any  # name of a module of torchvision; number of timm's feature
    output: Tensor


def _locate(network: nn.Module) -> dict[int, _Feature]:
    """Return the last feature of each stride of 2 to 32 that the network has, on a small image."""
    training = network.training
    network.eval()  # no running statistics change, and no random number is drawn
    # The graph for gradients leads from a feature to the parameters that it depends on.
    with torch.enable_grad():
        x = torch.zeros(1, 3, *TRIAL)
        locate = _locate_timm if hasattr(network, "pretrained_cfg") else _locate_torchvision
        found: dict[int, _Feature] = {}
        for place, output in locate(network, x):
            for stride in (2, 4, 8, 16, 32):
                if tuple(output.shape[-2:]) == tuple(side // stride for side in TRIAL):
                    found[stride] = _Feature(place, output)
    network.train(training)
    return dict(sorted(found.items()))


def _locate_timm(network: Any, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    outputs = network.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
    return ((place, output) for place, output in enumerate(outputs) if output.dim() == 4)


def _locate_torchvision(network: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the outputs of the network's parts in the order of their computation."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                outputs[name] = output

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in network.named_modules() if name]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()

    def strides(module: nn.Module, name: str) -> set[int]:
        sides = (
            outputs[f"{name}.{child}"].shape[-1]
            for child, _ in module.named_children()
            if f"{name}.{child}" in outputs
        )
        return set(sides)

    def parts(module: nn.Module, prefix: str) -> Iterator[str]:
        for child, inner in module.named_children():
            name = prefix + child
            if type(inner) is nn.Sequential and len(strides(inner, name)) >= _TRUNK_STRIDES:
                yield from parts(inner, f"{name}.")
            else:
                yield name

    wanted = set(parts(network, ""))
    return ((name, output) for name, output in outputs.items() if name in wanted)


def _used(outputs: list[Tensor]) -> set[nn.Parameter]:
    """Return the parameters that ``outputs`` depend on, by the graph of their computation."""
    waiting: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    found: set[nn.Parameter] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the end of the graph, where a gradient is stored
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def _cut(
    network: Any, places: list[Any], names: tuple[str, ...]
) -> tuple[nn.Module, Callable[[nn.Module, Tensor], list[Tensor]]]:
    """Return the network without what the features at ``places`` do not need, and what computes them."""
    if hasattr(network, "pretrained_cfg"):
        kept = network.prune_intermediate_layers(places, prune_norm=True, prune_head=True)
        return network, _Intermediates(tuple(kept))
    nodes = dict(zip(places, names, strict=True))
    return create_feature_extractor(network, nodes, suppress_diff_warning=True), _outputs


@contextmanager
def _trying(library: str, model: str) -> Iterator[None]:
    """Turn the failures of a network that does not take images of any size, or has no maps, into an error."""
    try:
        yield
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            "unfit-backbone",
            f"{library}'s {model} cannot be a backbone, which gives feature maps for images of any size: "
            f"{reason}; take a convolutional network",
        ) from error


def _set_norms(
    trunk: nn.Module, choice: str, norm: NormFactory, frozen: set[nn.Parameter], called: str
) -> None:
    """Replace the BatchNorms by the norms of ``MODEL.BACKBONE.NORM``; frozen ones become FrozenBN."""
    found = {
        child: (parent, name)
        for parent in trunk.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.BatchNorm2d)
    }
    if choice != "keep" and not found:
        raise UserError(
            "unfit-backbone", f"MODEL.BACKBONE.NORM {choice}: {called} has no BatchNorm; set it to keep"
        )
    for old, (parent, name) in found.items():
        is_frozen = old.weight in frozen
        new: nn.Module = old
        if choice == "GN":
            new = _group_norm(old, norm)
            for parameter in new.parameters(recurse=False):
                parameter.requires_grad_(not is_frozen)
        elif choice == "FrozenBN" or is_frozen:
            new = frozen_norm(old)
        elif choice == "SyncBN":
            new = _synchronised(old)
        setattr(parent, name, new)


def _set_convs(trunk: nn.Module) -> None:
    """Replace timm's convolutions with Weight Standardization by ours, which keep and export the result."""
    from timm.layers import StdConv2d

    for parent in list(trunk.modules()):
        for name, child in parent.named_children():
            if type(child) is StdConv2d:
                setattr(parent, name, WSConv2d.from_conv(child, "StdConv", child.eps))


def _has_activation(norm: nn.Module) -> bool:
    return isinstance(getattr(norm, "act", None), nn.Module)  # timm's BatchNormAct2d


def _group_norm(old: nn.BatchNorm2d, norm: NormFactory) -> nn.Module:
    new = norm(old.num_features)
    assert isinstance(new, GroupNorm)
    if not _has_activation(old):
        return new
    joined = GroupNormAct(new.num_groups, new.num_channels, new.eps)
    joined.attach(_or_none(old.act), _or_none(old.drop))
    return joined


def _or_none(module: Any) -> nn.Module | None:
    return module if isinstance(module, nn.Module) and not isinstance(module, nn.Identity) else None


def _synchronised(old: nn.BatchNorm2d) -> nn.Module:
    if not _has_activation(old):
        return nn.SyncBatchNorm.convert_sync_batchnorm(old)
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(old)


def _set_checkpointing(trunk: Any, model: str) -> None:
    key = "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trunk.modules()):
        raise UserError(
            "conflicting-keys",
            f"{key} needs a MODEL.BACKBONE.NORM without running statistics, which would be updated twice; "
            "choose GN or FrozenBN",
        )
    try:
        trunk.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise UserError(
            "unfit-backbone", f"{key}: timm's {model} does not have it; set it to False"
        ) from error

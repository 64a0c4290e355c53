"""Names of backbones: ``small``, torchvision's networks that give feature maps, ``timm/NAME``.

And ResNet-vd and ``vit``, which torchvision has not. Names and not the networks: a configuration is
checked without torch. A test holds the names against torchvision's.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

SMALL = "small"
VIT = "vit"
"""The vision transformers of LW-DETR and RF-DETR; what they are, ``backbone.vit`` says."""
DINOV3 = "dinov3"
"""DINOv3 with DEIMv2's adapter, likewise ``backbone.dinov3``."""
TIMM = "timm/"
"""Beginning of names of timm's networks; which there are, timm says when one is built."""

_VD = "ResNet-vd"
RESNET_VD = tuple(f"resnet{depth}vd" for depth in (18, 34, 50, 101))
"""ResNets with a deep stem and pooling shortcuts, as PaddleDetection and RT-DETR have them."""

FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ResNet": (
            *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
            *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
            *("wide_resnet50_2", "wide_resnet101_2"),
        ),
        "ConvNeXt": tuple(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
        "Swin": (
            *("swin_t", "swin_s", "swin_b"),
            *("swin_v2_t", "swin_v2_s", "swin_v2_b"),
        ),
        "EfficientNet": (
            *(f"efficientnet_b{size}" for size in range(8)),
            *(f"efficientnet_v2_{size}" for size in "sml"),
        ),
        "MobileNet": ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
        "RegNet": tuple(
            f"regnet_{kind}_{size}"
            for kind in "xy"
            for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf", "128gf")
            if (kind, size) != ("x", "128gf")
        ),
        "DenseNet": tuple(f"densenet{depth}" for depth in (121, 161, 169, 201)),
        "MNASNet": tuple(f"mnasnet{width}" for width in ("0_5", "0_75", "1_0", "1_3")),
        "ShuffleNet": tuple(f"shufflenet_v2_x{width}" for width in ("0_5", "1_0", "1_5", "2_0")),
        "VGG with batch norm": tuple(f"vgg{depth}_bn" for depth in (11, 13, 16, 19)),
        "VGG": tuple(f"vgg{depth}" for depth in (11, 13, 16, 19)),
        _VD: RESNET_VD,
    }
)
"""Names by family: all torchvision's but the last."""

WITHOUT_BATCH_NORM = ("ConvNeXt", "Swin", "VGG", "timm without batch norm", VIT, DINOV3)
"""Families that ``norm`` has nothing to act on in: LayerNorm, or no normalisation."""

_TIMM_LAYER_NORM = ("convnext", "swin", "hiera", "davit", "pvt_v2", "focalnet", "inception_next")
"""Beginnings of timm's names of networks with LayerNorm."""
_TIMM_VIT = ("vit_", "deit", "eva", "flexivit", "aimv2", "beit3", "test_vit")
"""Beginnings of timm's names of plain vision transformers; DINOv2's and v3's begin by ``vit_``."""

TORCHVISION = tuple(n for family, names in FAMILIES.items() if family != _VD for n in names)
BACKBONES = (SMALL, *TORCHVISION, *RESNET_VD, VIT, DINOV3)


def known_backbone(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: it is no backbone's; the text names the nearest ones.
    """
    if name in BACKBONES or (name.startswith(TIMM) and name != TIMM):
        return name
    close = difflib.get_close_matches(name, BACKBONES, n=3)
    examples = ", ".join(names[0] for names in FAMILIES.values())
    nearest = f"; did you mean {', '.join(close)}?" if close else f", for example {examples}"
    raise ValueError(
        f"found '{name}', expected '{SMALL}', '{VIT}', '{DINOV3}', {TIMM}NAME, a {_VD} or a "
        f"torchvision network with feature maps{nearest}"
    )


def is_timm_vit(name: str) -> bool:
    """Whether it is the name of one of timm's plain vision transformers."""
    return name.startswith(TIMM) and name.removeprefix(TIMM).startswith(_TIMM_VIT)


def family_of(name: str) -> str:
    """The family of a network; ``small`` for the network of our own; ViTs are of their own."""
    if name in (VIT, DINOV3):
        return name
    if name.startswith(TIMM):
        layer_norm = name.removeprefix(TIMM).startswith((*_TIMM_LAYER_NORM, *_TIMM_VIT))
        return "timm without batch norm" if layer_norm else "timm"
    return next((family for family, names in FAMILIES.items() if name in names), SMALL)

"""EfficientNet-Lite by the names of its PyTorch port."""

from torch import Tensor, nn


def as_the_port(theirs: nn.Module) -> dict[str, Tensor]:
    """Tensors of timm's network by the port's names, which number all blocks through."""
    stages = theirs.get_submodule("blocks").children()
    blocks = [(i, j) for i, stage in enumerate(stages) for j, _ in enumerate(stage.children())]
    plain = {"conv_dw": "depthwise_conv", "bn1": "bn1", "conv_pw": "project_conv", "bn2": "bn2"}
    wide = {"conv_pw": "expand_conv", "bn1": "bn0", "conv_dw": "depthwise_conv", "bn2": "bn1"}
    wide |= {"conv_pwl": "project_conv", "bn3": "bn2"}
    outer = {"conv_stem": "conv_stem", "bn1": "bn0", "conv_head": "conv_head", "bn2": "bn1"}
    outer["classifier"] = "fc"
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        parts = name.split(".")
        if parts[0] != "blocks":
            renamed[".".join(["_" + outer[parts[0]], *parts[1:]])] = tensor
            continue
        place = int(parts[1]), int(parts[2])
        layers = plain if place[0] == 0 else wide
        renamed[f"_blocks.{blocks.index(place)}._{layers[parts[3]]}.{parts[4]}"] = tensor
    return renamed

"""Every network of the zoo in PyTorch, written for the tests: module names are those of the programs named below.

Dimensions and names follow RepDistiller (and mdistiller), torchvision (`tv_`) and timm (`timm_`); forward passes in
evaluation only.
"""

import torch
from torch import nn
from torch.nn import functional as F

WIDE = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
GROUPS = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
STRIDES = {"tables": (1, 1, 2, 2, 1, 2, 1), "imagenet": (1, 2, 2, 2, 1, 2, 1)}


def conv(channels, filters, size, stride=1, groups=1, bias=False):
    return nn.Conv2d(channels, filters, size, stride, size // 2, groups=groups, bias=bias)


def conv_norm(channels, filters, size, stride=1, groups=1):
    return [conv(channels, filters, size, stride, groups), nn.BatchNorm2d(filters)]


class Residual(nn.Module):
    def __init__(self, channels, width, stride, bottleneck, shortcut):
        super().__init__()
        filters = 4 * width if bottleneck else width
        sizes = [(width, 1), (width, 3), (filters, 1)] if bottleneck else [(width, 3), (width, 3)]
        self.count, before, strided = len(sizes), channels, 1 if bottleneck else 0
        for index, (after, size) in enumerate(sizes):
            layer, norm = conv_norm(before, after, size, stride if index == strided else 1)
            setattr(self, f"conv{index + 1}", layer)
            setattr(self, f"bn{index + 1}", norm)
            before = after
        self.name = shortcut
        if stride != 1 or channels != filters:
            setattr(self, shortcut, nn.Sequential(*conv_norm(channels, filters, 1, stride)))

    def forward(self, x):
        y = x
        for index in range(1, self.count + 1):
            y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            y = F.relu(y) if index < self.count else y
        return F.relu(y + (getattr(self, self.name)(x) if hasattr(self, self.name) else x))


class ResNet(nn.Module):
    def __init__(self, depths, widths, classes, *, bottleneck=False, shortcut="downsample", head="fc", imagenet=False):
        super().__init__()
        channels, *stages = widths
        self.conv1, self.bn1 = conv_norm(3, channels, 7 if imagenet else 3, 2 if imagenet else 1)
        for stage, (depth, width) in enumerate(zip(depths, stages, strict=True), start=1):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(Residual(channels, width, stride, bottleneck, shortcut))
                channels = 4 * width if bottleneck else width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        setattr(self, head, nn.Linear(channels, classes))
        self.stages, self.head, self.imagenet = len(stages), head, imagenet

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return getattr(self, self.head)(x.mean((2, 3)))


class Preactivation(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3)
        self.convShortcut = conv(channels, width, 1, stride) if channels != width else None

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    def __init__(self, depth, widen, classes):
        super().__init__()
        self.conv1, channels = conv(3, 16, 3), 16
        for stage in (1, 2, 3):
            block, width = nn.Module(), 16 * widen * 2 ** (stage - 1)
            block.layer = nn.Sequential(
                *(
                    Preactivation(channels if index == 0 else width, width, 2 if stage > 1 and index == 0 else 1)
                    for index in range((depth - 4) // 6)
                )
            )
            setattr(self, f"block{stage}", block)
            channels = width
        self.bn1, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, classes)

    def forward(self, x):
        x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class VGG(nn.Module):
    def __init__(self, depth, classes):
        super().__init__()
        channels = 3
        for stage, width in enumerate((64, 128, 256, 512, 512)):
            layers = []
            for _ in range(depth):
                layers += [conv(channels, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            setattr(self, f"block{stage}", nn.Sequential(*layers))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x):
        large = x.shape[2] == 64
        for stage in range(5):
            if stage in (1, 2, 3) or (stage == 4 and large):
                x = F.max_pool2d(x, 2)
            x = getattr(self, f"block{stage}")(x)
        return self.classifier(x.mean((2, 3)))


class Shuffles(nn.Module):
    """A block of numbered convolutions."""

    def add(self, *layers):
        for index, layer in enumerate(layers, start=1):
            setattr(self, f"conv{index}", layer)
            setattr(self, f"bn{index}", nn.BatchNorm2d(layer.out_channels))

    def run(self, index, x, relu=True):
        x = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(x))
        return F.relu(x) if relu else x


class Grouped(Shuffles):
    def __init__(self, channels, filters, stride):
        super().__init__()
        hidden, self.groups, self.stride = filters // 4, 1 if channels == 24 else 3, stride
        self.add(
            conv(channels, hidden, 1, groups=self.groups),
            conv(hidden, hidden, 3, stride, groups=hidden),
            conv(hidden, filters, 1, groups=3),
        )

    def forward(self, x):
        y = F.channel_shuffle(self.run(1, x), self.groups)
        y = self.run(3, self.run(2, y), relu=False)
        return F.relu(y + x if self.stride == 1 else torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1))


class Halving(Shuffles):
    def __init__(self, channels, filters):
        super().__init__()
        half = filters // 2
        self.add(
            conv(channels, channels, 3, 2, groups=channels),
            conv(channels, half, 1),
            conv(channels, half, 1),
            conv(half, half, 3, 2, groups=half),
            conv(half, half, 1),
        )

    def forward(self, x):
        left = self.run(2, self.run(1, x, relu=False))
        right = self.run(5, self.run(4, self.run(3, x), relu=False))
        return F.channel_shuffle(torch.cat([left, right], 1), 2)


class Split(Shuffles):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.add(conv(half, half, 1), conv(half, half, 3, groups=half), conv(half, half, 1))

    def forward(self, x):
        kept, changed = x.chunk(2, 1)
        changed = self.run(3, self.run(2, self.run(1, changed), relu=False))
        return F.channel_shuffle(torch.cat([kept, changed], 1), 2)


class ShuffleNet(nn.Module):
    def __init__(self, version, classes):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(3, 24, 1)
        widths, channels = (24, 240, 480, 960) if version == 1 else (24, 116, 232, 464), 24
        for stage, blocks in ((1, 4), (2, 8), (3, 4)):
            before, width = widths[stage - 1], widths[stage]
            first = Grouped(before, width - before, 2) if version == 1 else Halving(before, width)
            rest = [Grouped(width, width, 1) if version == 1 else Split(width) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
            channels = width
        self.has_last = version == 2
        if self.has_last:
            self.conv2, self.bn2 = conv_norm(channels, 1024, 1)
            channels = 1024
        self.linear = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(self.bn2(self.conv2(x))) if self.has_last else x
        return self.linear(x.mean((2, 3)))


class Inverted(nn.Module):
    """`style` decides where the same layers hang."""

    def __init__(self, channels, filters, expansion, stride, style):
        super().__init__()
        hidden, act = channels * expansion, nn.ReLU if style == "tables" else nn.ReLU6
        self.residual, self.style = stride == 1 and channels == filters, style
        widen = conv_norm(channels, hidden, 1) if style == "tables" or expansion > 1 else None
        depthwise, project = conv_norm(hidden, hidden, 3, stride, hidden), conv_norm(hidden, filters, 1)
        if style == "tables":
            self.conv = nn.Sequential(*widen, act(), *depthwise, act(), *project)
        elif style == "torchvision":
            parts = [nn.Sequential(*layers, act()) for layers in (widen, depthwise) if layers]
            self.conv = nn.Sequential(*parts, *project)
        else:
            names = ("conv_pw", "conv_dw", "conv_pwl") if widen else ("conv_dw", "conv_pw")
            self.names = names
            layers = [layer for layer in (widen, depthwise, project) if layer]
            for index, (name, (layer, norm)) in enumerate(zip(names, layers, strict=True), start=1):
                setattr(self, name, layer)
                setattr(self, f"bn{index}", norm)

    def forward(self, x):
        if self.style == "timm":
            y = x
            for index, name in enumerate(self.names, start=1):
                y = getattr(self, f"bn{index}")(getattr(self, name)(y))
                y = F.relu6(y) if index < len(self.names) else y
        else:
            y = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    def __init__(self, style, classes):
        super().__init__()
        self.style, scale = style, 0.5 if style == "tables" else 1.0
        channels = int(32 * scale)
        stem, groups = conv_norm(3, channels, 3, 2), []
        strides = STRIDES["tables" if style == "tables" else "imagenet"]
        for (expansion, base, blocks), stride in zip(GROUPS, strides, strict=True):
            group = []
            for index in range(blocks):
                filters = int(base * scale)
                group.append(Inverted(channels, filters, expansion, stride if index == 0 else 1, style))
                channels = filters
            groups.append(group)
        last = conv_norm(channels, 1280, 1)
        if style == "tables":
            self.conv1, self.conv2 = nn.Sequential(*stem, nn.ReLU()), nn.Sequential(*last, nn.ReLU())
            self.blocks = nn.ModuleList(nn.Sequential(*group) for group in groups)
            self.classifier = nn.Sequential(nn.Linear(1280, classes))
        elif style == "torchvision":
            flat = [block for group in groups for block in group]
            self.features = nn.Sequential(nn.Sequential(*stem, nn.ReLU6()), *flat, nn.Sequential(*last, nn.ReLU6()))
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        else:
            (self.conv_stem, self.bn1), (self.conv_head, self.bn2) = stem, last
            self.blocks = nn.Sequential(*(nn.Sequential(*group) for group in groups))
            self.classifier = nn.Linear(1280, classes)

    def forward(self, x):
        if self.style == "torchvision":
            x = self.features(x)
        elif self.style == "timm":
            x = self.blocks(F.relu6(self.bn1(self.conv_stem(x))))
            x = F.relu6(self.bn2(self.conv_head(x)))
        else:
            x = self.conv1(x)
            for group in self.blocks:
                x = group(x)
            x = self.conv2(x)
        return self.classifier(x.mean((2, 3)))


def build(name, classes, seed=0):
    """A network by its name here, or with `tv_` or `timm_` before it; weights and batch statistics are random."""
    torch.manual_seed(seed)
    bare = name.removeprefix("tv_").removeprefix("timm_")
    if bare == "mobilenetv2":
        style = {"": "tables", "tv_": "torchvision", "timm_": "timm"}[name.removesuffix(bare)]
        model = MobileNetV2(style, classes)
    elif bare in WIDE:
        options = {"bottleneck": bare == "resnet50"}
        if name == bare:
            options |= {"shortcut": "shortcut", "head": "linear"}
        else:
            options |= {"imagenet": True}
        model = ResNet(WIDE[bare], (64, 64, 128, 256, 512), classes, **options)
    elif bare.startswith("resnet"):
        depth, _, four = bare.removeprefix("resnet").partition("x")
        widths = (32, 64, 128, 256) if four else (16, 16, 32, 64)
        model = ResNet(((int(depth) - 2) // 6,) * 3, widths, classes)
    elif bare.startswith("wrn"):
        model = WideResNet(*map(int, bare.split("_")[1:]), classes)
    elif bare.startswith("vgg"):
        model = VGG({"vgg8": 1, "vgg13": 2}[bare], classes)
    else:
        model = ShuffleNet(int(bare[-1]), classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # PyTorch's own default is smaller: behind fifty layers logits would no longer depend on the image.
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(tensor, low, high)
    return model.eval()

"""Convolutional classifiers: ResNet50, VGG19 and an Inception-like network. Dims: b images, c and o channels, y x places.

Batch norm is a scale and a shift per channel: its statistics stay on the device in data parallelism, so it communicates like one.
`width` and `depth` scale a network down for tests; 1 is the published one.
"""

from __future__ import annotations

from typing import Any

from apportion.core.errors import InvalidParameter
from apportion.simulator.models.builder import Builder
from apportion.simulator.ops import Model


class _Net:
    def __init__(self, name: str, batch: int, image: int, classes: int, width: float, dtype: str) -> None:
        self.b = Builder(name, dtype)
        self.batch, self.classes, self.width = batch, classes, width
        self.x = self.b.input("image", batch, 3, image, image)
        self.labels = self.b.input("labels", batch, dtype="int32")

    def channels(self, count: int) -> int:
        return max(2, round(count * self.width))

    def shape(self, x: str) -> tuple[int, ...]:
        return self.b.model.tensors[x].shape

    def conv(self, path: str, x: str, out: int, kernel: int, stride: int = 1, *, act: bool = True) -> str:
        """Convolution with 'same' padding, batch norm and ReLU."""
        b, (_, channels, height, width) = self.b, self.shape(x)
        sizes = {"y": -(-height // stride), "x": -(-width // stride)}
        w = b.weight(f"{path}.conv", out, channels, kernel, kernel)
        attrs: dict[str, Any] = {"stride": stride, "padding": kernel // 2}
        x = b.op(f"{path}.conv", "conv2d", "b c _ _, o c _ _ -> b o y x", x, w, opaque="y x", sizes=sizes, **attrs)
        scale, shift = b.weight(f"{path}.bn", out), b.weight(f"{path}.bn.shift", out)
        x = b.op(f"{path}.bn", "scale_shift", "b c y x, c, c -> b c y x", x, scale, shift, opaque="y x")
        return b.op(f"{path}.relu", "relu", "b c y x -> b c y x", x, opaque="y x") if act else x

    def pool(self, path: str, x: str, kind: str, kernel: int, stride: int, padding: int = 0) -> str:
        _, _, height, width = self.shape(x)
        if min(height, width) + 2 * padding < kernel:
            raise InvalidParameter(f"pooling window {kernel} of {path!r} is larger than its {height} x {width} image")
        sizes = {n: (size + 2 * padding - kernel) // stride + 1 for n, size in (("y", height), ("x", width))}
        attrs: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding}
        return self.b.op(path, kind, "b c _ _ -> b c y x", x, opaque="y x", sizes=sizes, **attrs)

    def classify(self, x: str) -> Model:
        """Global average and one linear layer."""
        size = self.shape(x)[2]
        x = self.pool("head.pool", x, "avg_pool", size, 1)
        w = self.b.weight("head.fc", self.classes, *self.shape(x)[1:])
        return self.loss(self.b.op("head.fc", "einsum", "b c y x, o c y x -> b o", x, w))

    def loss(self, logits: str) -> Model:
        self.b.op("loss", "cross_entropy", "b v, b -> ", logits, self.labels, opaque="v", scale=1 / self.batch)
        return self.b.model


def vgg19(batch: int, image: int = 224, classes: int = 1000, *, width: float = 1.0, dtype: str = "float32") -> Model:
    """Five blocks of convolutions, then three linear layers that hold most of the weights (arXiv:1409.1556, configuration E)."""
    net = _Net("vgg19", batch, image, classes, width, dtype)
    x = net.x
    for i, (count, channels) in enumerate(((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))):
        for j in range(count):
            x = net.conv(f"features.{i}.{j}", x, net.channels(channels), 3)
        x = net.pool(f"features.{i}.pool", x, "max_pool", 2, 2)
    b, hidden = net.b, net.channels(4096)
    x = b.op("classifier.fc1", "einsum", "b c y x, o c y x -> b o", x, b.weight("classifier.fc1", hidden, *net.shape(x)[1:]))
    x = b.op("classifier.relu1", "relu", "b o -> b o", x)
    x = b.op("classifier.fc2", "einsum", "b h, o h -> b o", x, b.weight("classifier.fc2", hidden, hidden))
    x = b.op("classifier.relu2", "relu", "b o -> b o", x)
    return net.loss(b.op("classifier.fc3", "einsum", "b h, o h -> b o", x, b.weight("classifier.fc3", classes, hidden)))


def resnet50(
    batch: int, image: int = 224, classes: int = 1000, *, width: float = 1.0, blocks: tuple[int, ...] = (3, 4, 6, 3), dtype: str = "float32"
) -> Model:
    """Bottleneck blocks with shortcuts (arXiv:1512.03385, table 1)."""
    net = _Net("resnet50", batch, image, classes, width, dtype)
    x = net.conv("stem", net.x, net.channels(64), 7, 2)
    x = net.pool("stem.pool", x, "max_pool", 3, 2, 1)
    for i, count in enumerate(blocks):
        inner, outer = net.channels(64 * 2**i), net.channels(256 * 2**i)
        for j in range(count):
            path, stride = f"layers.{i}.{j}", 2 if i and not j else 1
            h = net.conv(f"{path}.a", x, inner, 1)
            h = net.conv(f"{path}.b", h, inner, 3, stride)
            h = net.conv(f"{path}.c", h, outer, 1, act=False)
            shortcut = net.conv(f"{path}.shortcut", x, outer, 1, stride, act=False) if not j else x
            h = net.b.op(f"{path}.add", "add", "b c y x, b c y x -> b c y x", h, shortcut, opaque="y x")
            x = net.b.op(f"{path}.relu", "relu", "b c y x -> b c y x", h, opaque="y x")
    return net.classify(x)


def inception(batch: int, image: int = 224, classes: int = 1000, *, width: float = 1.0, blocks: int = 9, dtype: str = "float32") -> Model:
    """Blocks of four branches that are concatenated (arXiv:1409.4842, figure 2b), of one size throughout: like, not equal to, Inception."""
    net = _Net("inception", batch, image, classes, width, dtype)
    x = net.conv("stem", net.x, net.channels(64), 7, 2)
    x = net.pool("stem.pool", x, "max_pool", 3, 2, 1)
    for i in range(blocks):
        path = f"blocks.{i}"
        branches = [
            net.conv(f"{path}.one", x, net.channels(64), 1),
            net.conv(f"{path}.three.b", net.conv(f"{path}.three.a", x, net.channels(96), 1), net.channels(128), 3),
            net.conv(f"{path}.five.b", net.conv(f"{path}.five.a", x, net.channels(16), 1), net.channels(32), 5),
            net.conv(f"{path}.pooled", net.pool(f"{path}.pool", x, "max_pool", 3, 1, 1), net.channels(32), 1),
        ]
        channels = sum(net.shape(branch)[1] for branch in branches)
        spec = ", ".join(["b _ y x"] * 4) + " -> b c y x"
        x = net.b.op(f"{path}.concat", "concat", spec, *branches, opaque="y x c", sizes={"c": channels})
    return net.classify(x)

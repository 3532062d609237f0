"""Networks by name, and the small networks that come with the package."""
from .cifar import CIFAR, convnet, resnet
from .mnist import MNIST, MNIST_SHAPE, Shape, mnist_a, mnist_b, mnist_c, mnist_c_tanh, mnist_d
from .names import did_you_mean
from .specs import AUX, Normalized, build, check, load_weights, parse, parts, short_name, unique_names

__all__ = [
    "AUX", "CIFAR", "MNIST", "MNIST_SHAPE", "Normalized", "Shape", "build", "check", "convnet", "did_you_mean",
    "load_weights", "mnist_a", "mnist_b", "mnist_c", "mnist_c_tanh", "mnist_d", "parse", "parts", "resnet",
    "short_name", "unique_names",
]

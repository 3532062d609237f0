"""Images and labels: from memory or from files, in an order that can stop and go on anywhere, augmented on the device.

`load` makes a :class:`Dataset` of two splits. What every split can do is :class:`ImageSplit`: images come as float32
in [0, 1] by their positions. :class:`Split` holds them in memory as uint8, :class:`FolderSplit` decodes files.
`Sampler` is the order, `Stream` gives the batches, `Augment` crops and mirrors. Nothing is downloaded.
"""
from ..ops.keys import derive_seed
from .augment import Augment
from .cifar import cifar10, cifar100
from .folder import FolderSplit, image_folder
from .mnist import digits, idx_dataset
from .sampler import Sampler
from .sets import Dataset, ImageSplit, Split
from .stream import CorruptImages, Stream

__all__ = ["Augment", "CorruptImages", "Dataset", "FolderSplit", "ImageSplit", "Sampler", "Split", "Stream", "cifar10",
           "cifar100", "derive_seed", "digits", "idx_dataset", "image_folder", "load"]


def load(spec: str, size: int | None = None, resize: int | None = None) -> Dataset:
    """The data set that `spec` names: `digits`, `mnist`, `fashion-mnist`, `cifar10` or `cifar100`, the last four
    optionally with `:DIR`; `imagefolder:DIR` or `imagenet:DIR`, folders of image files.

    size: height and width of the images that networks take: for folders (default 224); the images of other sets are
    not resized. resize: for folders, see :func:`image_folder`.

    Raises ValueError for another name, or a size or resize that the set does not have; otherwise what the set's own
    function raises, such as FileNotFoundError.
    """
    name, _, folder = spec.partition(":")
    if name in ("imagefolder", "imagenet") and folder:
        return image_folder(name, folder, size, resize)
    if name == "digits" and not folder:
        found = digits()
    elif name in ("mnist", "fashion-mnist"):
        found = idx_dataset(name, folder or None)
    elif name in ("cifar10", "cifar100"):
        found = {"cifar10": cifar10, "cifar100": cifar100}[name](folder or None)
    else:
        raise ValueError("data: spec must be digits, mnist[:DIR], fashion-mnist[:DIR], cifar10[:DIR], cifar100[:DIR], "
                         f"imagefolder:DIR or imagenet:DIR, got {spec!r}")
    if size not in (None, found.in_shape[1]) or resize is not None:
        raise ValueError(f"data: {name}: size must be that of its images, {found.in_shape[1:]}, and resize None, since "
                         f"only folders of image files are resized, got size={size}, resize={resize}")
    return found

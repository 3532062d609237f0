"""model_entry's CPU kernels on numpy arrays, without torch: bit for bit the plain expression, in every dtype, memory
format and alignment, forward and backward."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels_arrays import (
    DTYPES,
    Output,
    batches,
    cast,
    compute,
    examples,
    gradients,
    images,
    kernels,
    place,
    ref,
    same,
)

FLOATS = tuple(d for d in DTYPES if d != "uint8")


def planes(memory, shape, last: bool):
    """[sample, channel, pixel] from the order of the memory."""
    n, c, s = shape
    return memory.reshape(n, s, c).transpose(0, 2, 1) if last else memory.reshape(n, c, s)


def in_memory(v, last: bool):
    return np.ascontiguousarray(v.transpose(0, 2, 1) if last else v).ravel()


def entry_reference(x, delta, mean, std, clamp, grad=None):
    """[sample, channel, pixel], in the type of mean and std; `grad`: the backward pass."""
    with np.errstate(all="ignore"):
        zero, one = std.dtype.type(0), std.dtype.type(1)
        v = x if delta is None or x is None else x + delta
        if grad is not None:
            return (np.where((v >= zero) & (v <= one), grad, zero) if clamp else grad) / std[:, None]
        if clamp:
            v = np.where(v < zero, zero, v)
            v = np.where(v > one, one, v)
        return (v - mean[:, None]) / std[:, None]


class Entry:
    """A drawn call: its arrays as they lie in memory, and what each means."""

    def __init__(self, data, batch):
        self.backward, self.clamp, self.wide = (data.draw(st.booleans()) for _ in range(3))
        channels = data.draw(st.sampled_from([c for c in (1, 2, 3, 4, 5, 64) if batch.inner % c == 0]))
        self.shape, self.spatial = (batch.n, channels, batch.inner // channels), batch.inner // channels
        self.lasts = {name: data.draw(st.booleans()) for name in ("x", "delta", "grad", "out")}
        if self.backward:
            self.lasts["x"] = self.lasts["out"]
        self.dtypes = {name: data.draw(st.sampled_from(DTYPES if name == "x" else FLOATS)) for name in self.lasts}
        self.has = {"x": self.clamp or not self.backward, "delta": data.draw(st.booleans()), "grad": self.backward}
        make = {"x": images, "delta": gradients, "grad": gradients}
        self.memory = {name: make[name](batch.rng, batch.size, self.dtypes[name], lead, specials=True)
                       if self.has[name] else None for name, lead in zip(make, batch.leads)}
        kind = np.float64 if self.wide else np.float32
        self.mean, self.std = (place(batch.rng.uniform(0.1, 0.9, channels).astype(kind), 1) for _ in range(2))
        self.out_leads = batch.leads[3], batch.leads[0]

    def reference(self):
        read = {name: None if m is None else
                planes(compute(m, self.dtypes[name], self.wide), self.shape, self.lasts[name])
                for name, m in self.memory.items()}
        v = entry_reference(read["x"], read["delta"], self.mean, self.std, self.clamp, read["grad"])
        with np.errstate(all="ignore"):
            return cast(in_memory(v, self.lasts["out"]), self.dtypes["out"])

    def run(self, ranges):
        out = Output(int(np.prod(self.shape)), self.dtypes["out"], *self.out_leads)
        arrays = {name: ref(m, self.dtypes[name]) for name, m in self.memory.items()}
        mean, std = (ref(v, str(v.dtype)) for v in (self.mean, self.std))
        flags = {"delta_last": self.lasts["delta"], "out_last": self.lasts["out"], "clamp": self.clamp}
        for r in ranges:
            room = ref(out.array, self.dtypes["out"])
            if self.backward:
                kernels.model_entry_grad(arrays["grad"], arrays["x"], arrays["delta"], room, std, self.spatial,
                                         grad_last=self.lasts["grad"], range=r, **flags)
            else:
                kernels.model_entry(arrays["x"], arrays["delta"], room, mean, std, self.spatial,
                                    x_last=self.lasts["x"], range=r, **flags)
        return out.result()


@examples
@given(batches(), st.data(), st.lists(st.integers(0, 300), max_size=5))
def test_model_entry(batch, data, cuts):
    entry = Entry(data, batch)
    whole = entry.run([kernels.Range()])
    same(whole, entry.reference(), entry.dtypes["out"])
    pixels = entry.shape[0] * entry.spatial
    bounds = sorted({0, pixels, *(c for c in cuts if c < pixels)})
    pieces = entry.run([kernels.Range(*ends) for ends in zip(bounds, bounds[1:])])
    assert pieces.tobytes() == whole.tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_length_to_300(dtype, channels):
    """From bytes to the model's dtype and memory format, at every alignment of each."""
    rng = np.random.default_rng(300)
    mean, std = (rng.uniform(0.2, 0.6, channels).astype(np.float32) for _ in range(2))
    for spatial in range(1, 301):
        x = images(rng, channels * spatial, "uint8", spatial % 17)
        delta = gradients(rng, x.size, "float32", spatial % 5)
        for last in (False, True):
            out = Output(x.size, dtype, spatial % 9, 3)
            kernels.model_entry(ref(x, "uint8"), ref(delta, "float32"), ref(out.array, dtype), ref(mean, "float32"),
                                ref(std, "float32"), spatial, out_last=last)
            v = entry_reference(*(planes(compute(a, d), (1, channels, spatial), False)
                                  for a, d in ((x, "uint8"), (delta, "float32"))), mean, std, True)
            with np.errstate(all="ignore"):
                same(out.result(), cast(in_memory(v, last), dtype), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads(dtype):
    """The pieces of torch's parallel_for, at once; ThreadSanitizer watches this one."""
    rng = np.random.default_rng(2)
    x, delta = images(rng, 12 * 3 * 1111, "uint8"), gradients(rng, 12 * 3 * 1111, "float32")
    mean, std = (ref(np.full(3, 0.4, np.float32), "float32") for _ in range(2))
    results = []
    for threads in (1, 4):
        out, back = Output(x.size, dtype), Output(x.size, "float32")
        kernels.model_entry(ref(x, "uint8"), ref(delta, "float32"), ref(out.array, dtype), mean, std, 1111,
                            out_last=True, range=kernels.Range(threads=threads))
        kernels.model_entry_grad(ref(out.array, dtype), ref(x, "uint8"), ref(delta, "float32"),
                                 ref(back.array, "float32"), std, 1111, grad_last=True,
                                 range=kernels.Range(threads=threads))
        results.append((out.result().tobytes(), back.result().tobytes()))
    assert results[0] == results[1]

"""How a kernel moves along one axis of its input, and which positions it reads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Window:
    """How a convolution's kernel moves along one spatial axis.

    Attributes:
      size: the length of the kernel.
      inputs: the number of positions of the input.
      outputs: the number of positions of the output.
      stride: the number of input positions per output position.
      low: the number of zeros before the dilated input.
      input_dilation: the spacing of the input's positions.
      kernel_dilation: the spacing of the kernel's positions.
      margin: the numbers of positions added on both sides before dilation, filled as `mode` says.
      mode: a mode of `numpy.pad`; `"constant"` means zeros.
      flip: whether the kernel is applied back to front.
    """

    size: int
    inputs: int
    outputs: int
    stride: int = 1
    low: int = 0
    input_dilation: int = 1
    kernel_dilation: int = 1
    margin: tuple[int, int] = (0, 0)
    mode: str = "constant"
    flip: bool = False

    def sources(self) -> np.ndarray:
        """Returns the input position behind each position of the padded input; -1 for a zero."""
        fill = {"constant_values": -1} if self.mode == "constant" else {}
        return np.pad(np.arange(self.inputs), self.margin, mode=self.mode, **fill)  # type: ignore[call-overload]

    def reads(self) -> np.ndarray:
        """Returns the input position that each (kernel position, output position) reads, or -1."""
        source = self.sources()
        dilated = np.full((len(source) - 1) * self.input_dilation + 1, -1)
        dilated[:: self.input_dilation] = source
        offset = np.arange(self.size)[:, None] * self.kernel_dilation
        place = offset + np.arange(self.outputs)[None, :] * self.stride - self.low
        inside = (place >= 0) & (place < len(dilated))
        found = np.where(inside, dilated[np.where(inside, place, 0)], -1)
        return found[::-1] if self.flip else found

    def _steps(self, places: np.ndarray) -> np.ndarray:
        """Returns how far positions of the padded input are ahead of the kernel's, (size, places).

        A kernel position reads such a position for the output that is this distance over the
        stride, if that is a whole number and an output.
        """
        offset = np.arange(self.size)[:, None] * self.kernel_dilation
        steps = places * self.input_dilation + self.low - offset
        return steps[::-1] if self.flip else steps

    def counts(self, positions: np.ndarray) -> np.ndarray:
        """Returns how often each kernel position reads each input position, (size, positions).

        Args:
          positions: some positions of the input, in increasing order.
        """
        source = self.sources()
        places = np.flatnonzero(np.isin(source, positions))
        steps = self._steps(places)
        reads = (steps % self.stride == 0) & (steps >= 0) & (steps < self.outputs * self.stride)
        counts = np.zeros((len(positions), self.size), int)
        np.add.at(counts, np.searchsorted(positions, source[places]), reads.T)
        return counts.T

    def regular(self) -> np.ndarray:
        """Returns the pattern of `counts` far from the edges, which repeats, (size, stride).

        Example:
          >>> window = Window(3, 8, 8, low=1)
          >>> window.regular().ravel().tolist(), window.edges().tolist()
          ([1, 1, 1], [0, 7])
        """
        steps = self._steps(np.arange(self.stride) + self.margin[0])
        return (steps % self.stride == 0).astype(int)

    def edges(self) -> np.ndarray:
        """Returns the input positions, in order, at which `counts` may differ from `regular`."""
        source = self.sources()
        reach = (self.size - 1) * self.kernel_dilation
        steps = (np.arange(self.inputs) + self.margin[0]) * self.input_dilation + self.low
        inner = (steps >= reach) & (steps < self.outputs * self.stride)
        low, high = self.margin
        inner[source[:low][source[:low] >= 0]] = False
        inner[source[len(source) - high :][source[len(source) - high :] >= 0]] = False
        return np.flatnonzero(~inner)

    def sums(self, totals: jax.Array) -> jax.Array:
        """Returns the product of `counts` of all positions with an array (any, inputs, any).

        Each kernel position reads `outputs` entries, spaced by the stride: a contiguous window on
        the entries of one phase. The entries are divided into blocks of a window's length. A window
        is then the end of one block and the beginning of the next. So the sums are cumulative sums
        within blocks: no matrix of counts is stored, and nothing is subtracted.
        """
        source = self.sources()
        if any(self.margin):
            padding = jnp.asarray(source < 0)[:, None]
            totals = jnp.where(padding, 0, jnp.take(totals, np.maximum(source, 0), axis=1))
        starts = np.arange(self.size) * self.kernel_dilation
        if self.flip:
            starts = starts[::-1]
        first, phase = starts // self.stride, starts % self.stride
        blocks = (int(max(first)) + self.outputs - 1) // self.outputs + 1
        length = (totals.shape[1] - 1) * self.input_dilation + 1
        high = blocks * self.outputs * self.stride - self.low - length
        gaps = [(0, 0, 0), (self.low, high, self.input_dilation - 1), (0, 0, 0)]
        totals = jax.lax.pad(totals, jnp.zeros((), totals.dtype), gaps)
        before, _, after = totals.shape
        totals = totals.reshape(before, blocks, self.outputs, self.stride, after)

        def at(sums: jax.Array, places: np.ndarray) -> jax.Array:
            flat = sums.reshape(before, blocks * self.outputs, self.stride, after)
            return flat[:, places, phase]

        ends = at(jax.lax.cumsum(totals, 2, reverse=True), first)
        beginnings = at(jax.lax.cumsum(totals, 2), first + self.outputs - 1)
        return ends + jnp.where(jnp.asarray(first % self.outputs > 0)[:, None], beginnings, 0)

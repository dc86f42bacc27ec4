"""Converts a streaming TFLite graph into a stateless ONNX graph with a dynamic batch.

TFLite keeps what a causal network remembers between frames in resource variables of the interpreter, so that one interpreter serves one
stream. Here the memory becomes an input and an output, one vector of f32 a stream: one session serves every stream, in batches.

Layout: an activation [1, time, 1, channels] becomes [batch, channels, 1, time], because ONNX Runtime's fast kernels are for two-dimensional
images only, and go along the rows of them. Time may be any number of frames, one after another: convolutions are causal and slices count from the end, so that a run over
several is the same as a run for each. Quantized constants are multiplied out to f32 and the steps between int8 and f32 are left out: ONNX Runtime's int8 convolutions
are two to four times slower than its f32 ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import tflite
from onnx import TensorProto, helper, numpy_helper

from .tflite_graph import Operator, Subgraph, Unsupported

OPSET = 13
IR_VERSION = 8
STATE_IN, STATE_OUT = "state_in", "state_out"

NO_ACTIVATION = tflite.ActivationFunctionType.NONE
VALID = tflite.Padding.VALID

# TFLite's axis of [1, time, 1, channels] -> ours of [batch, channels, 1, time].
AXES = {0: 0, 1: 3, 2: 2, 3: 1, -1: 1, -2: 2, -3: 3}

# ONNX's "to the end" of a slice.
END = 2**63 - 1

# StridedSlice masks of the axes that are left whole: all but bit 1, the time.
ALL_BUT_TIME = 0b1101


@dataclass(frozen=True)
class State:
    """One of the graph's variables: [channels, time] of it lie at `offset` in the state vector, row by row."""

    name: str
    channels: int
    time: int
    offset: int

    @property
    def size(self) -> int:
        return self.channels * self.time


@dataclass(frozen=True)
class Converted:
    """The ONNX model and the parts of its state vector; all states start as zeros."""

    model: onnx.ModelProto
    states: list[State]
    names: dict[int, str]
    """ONNX value of each tensor of the TFLite graph that is computed."""
    through: dict[int, int]
    """Tensors that are computed in one with another, which has no value of its own: that one."""

    @property
    def state_size(self) -> int:
        return sum(state.size for state in self.states)


def convert(subgraphs: list[Subgraph], name: str, source: str, sink: str, about: dict[str, str]) -> Converted:
    """Converts the main subgraph; its input and output are called `source` and `sink`. `about` is written into the file as metadata.

    Raises `Unsupported` for anything whose meaning the result would not keep.
    """
    return _Conversion(subgraphs, source, sink).run(name, about)


class _Conversion:
    def __init__(self, subgraphs: list[Subgraph], source: str, sink: str) -> None:
        self.graph = subgraphs[0]
        self.source, self.sink = source, sink
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.known: dict[bytes, str] = {}
        self.names: dict[int, str] = {}
        """ONNX value of a TFLite tensor."""
        self.variables: dict[int, str] = {}
        """Variable behind a handle tensor."""
        self.tails: dict[int, tuple[str, int]] = {}
        """Tensors that are a value, so many steps long, and zeros after it: nothing is made of them but a sum."""
        self.through: dict[int, int] = {}
        self.upsampled: dict[int, tuple[Operator, str, str]] = {}
        """Transposed convolutions of a kernel of two strides: the operator, and the values of the first and of the second stride."""
        self.ends: dict[int, tuple[Operator, str, str]] = {}
        """Tails with the bias in them."""
        self.scattered: dict[int, tuple[Operator, str, str]] = {}
        """Sums of a transposed convolution and the tail before it: with the value of its first steps, and of its next tail."""
        self.held: dict[str, str] = {}
        """ONNX value that a variable holds now."""
        self.states = _states(subgraphs)
        if len(self.graph.inputs) != 1 or len(self.graph.outputs) != 1:
            raise Unsupported(f"the graph has {len(self.graph.inputs)} inputs and {len(self.graph.outputs)} outputs; one of each is needed")

    def run(self, name: str, about: dict[str, str]) -> Converted:
        taken, given = self.graph.inputs[0], self.graph.outputs[0]
        self.names[taken] = self.source
        self._unpack()
        for operator in self.graph.operators():
            method = getattr(self, "_" + operator.name.lower(), None)
            if method is None:
                raise Unsupported(f"{operator} is not known")
            method(operator)
        self._pack()
        self._node("Reshape", [self.names[given], self._constant([0, -1])], output=self.sink)
        state = sum(s.size for s in self.states)
        model = helper.make_model(
            helper.make_graph(
                self.nodes,
                name,
                [_value(self.source, f"{self.source}_size"), _value(STATE_IN, state)],
                [_value(self.sink, f"{self.sink}_size"), _value(STATE_OUT, state)],
                self.initializers,
            ),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="auralink",
        )
        # Not set_model_props: a list in a fixed order keeps the file the same on every run.
        for key in sorted(about):
            model.metadata_props.add(key=key, value=about[key])
        onnx.checker.check_model(model, full_check=True)
        return Converted(model, self.states, self.names, self.through)

    # ---- pieces of the result

    def _node(self, kind: str, inputs: list[str], count: int = 1, output: str | None = None, **attributes):
        """Adds a node; its outputs are named by its number. One name, or a list of `count`."""
        number = len(self.nodes)
        outputs = [output] if output else [f"{kind}_{number}" if count == 1 else f"{kind}_{number}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=f"{kind}_{number}", **attributes))
        return outputs[0] if count == 1 else outputs

    def _constant(self, values) -> str:
        """Adds an initializer: lists are int64, arrays f32. Equal ones are stored once."""
        array = np.ascontiguousarray(values, dtype=np.int64 if isinstance(values, list) else np.float32)
        key = repr((array.dtype.str, array.shape)).encode() + array.tobytes()
        if key not in self.known:
            self.known[key] = f"constant_{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]

    def _unpack(self) -> None:
        """Cuts the state vector into the variables."""
        sizes = [state.size for state in self.states]
        parts = self._node("Split", [STATE_IN, self._constant(sizes)], len(sizes), axis=1)
        for state, part in zip(self.states, parts, strict=True):
            self.held[state.name] = self._node("Reshape", [part, self._constant([0, state.channels, 1, state.time])])

    def _pack(self) -> None:
        """Joins what the variables hold at the end into the next state vector."""
        flat = [self._node("Reshape", [self.held[state.name], self._constant([0, state.size])]) for state in self.states]
        self._node("Concat", flat, output=STATE_OUT, axis=1)

    def _value(self, operator: Operator, position: int) -> str:
        """The ONNX value of an input that is computed."""
        tensor = operator.inputs[position]
        if tensor not in self.names:
            raise Unsupported(f"input {position} of {operator}, {self.graph.name(tensor)}, is not computed by an earlier operator")
        return self.names[tensor]

    def _bias(self, operator: Operator, position: int) -> str:
        if len(operator.inputs) <= position or operator.inputs[position] < 0:
            raise Unsupported(f"{operator} has no bias")
        return self._constant(self.graph.values(operator.inputs[position]))

    def _set(self, operator: Operator, value: str) -> None:
        self.names[operator.outputs[0]] = value

    # ---- variables

    def _call_once(self, operator: Operator) -> None:
        """Runs the initialisation; `_states` has read it."""

    def _var_handle(self, operator: Operator) -> None:
        self.variables[operator.outputs[0]] = _variable(operator)

    def _read_variable(self, operator: Operator) -> None:
        self._set(operator, self.held[self.variables[operator.inputs[0]]])

    def _assign_variable(self, operator: Operator) -> None:
        self.held[self.variables[operator.inputs[0]]] = self._value(operator, 1)

    # ---- between int8 and f32: nothing is left to do

    def _quantize(self, operator: Operator) -> None:
        if operator.inputs[0] in self.upsampled:
            self.upsampled[operator.outputs[0]] = self.upsampled[operator.inputs[0]]
        else:
            self._set(operator, self._value(operator, 0))

    _dequantize = _quantize

    # ---- shapes

    def _reshape(self, operator: Operator) -> None:
        before, after = (self.graph.shape(tensor) for tensor in (operator.inputs[0], operator.outputs[0]))
        for shape in (before, after):
            if len(shape) == 4 and shape[1] > 1 and shape[3] > 1:
                raise Unsupported(f"{operator} reads time and channels as one: their order differs in ONNX")
        value = self._value(operator, 0)
        # What is flat has the channels of one step beside those of the next.
        if len(before) == 4 and before[3] > 1 and len(after) != 4:
            value = self._node("Transpose", [value], perm=[0, 3, 2, 1])
        if len(after) != 4:
            value = self._node("Reshape", [value, self._constant([0, -1])])
        elif after[3] > 1:
            value = self._node("Reshape", [value, self._constant([0, -1, after[2], after[3]])])
            value = self._node("Transpose", [value], perm=[0, 3, 2, 1])
        else:
            value = self._node("Reshape", [value, self._constant([0, after[3], after[2], -1])])
        self._set(operator, value)

    def _strided_slice(self, operator: Operator) -> None:
        options = operator.options(tflite.StridedSliceOptions)
        begin, end, stride = (self.graph.constant(tensor) for tensor in operator.inputs[1:4])
        whole = (options.BeginMask() & options.EndMask() & ALL_BUT_TIME) == ALL_BUT_TIME
        odd = options.EllipsisMask() or options.NewAxisMask() or options.ShrinkAxisMask()
        if begin is None or end is None or stride is None or not whole or odd or (stride != 1).any():
            raise Unsupported(f"{operator} is no plain slice of time with constant ends")
        time = self.graph.shape(operator.inputs[0])[1]
        first = 0 if options.BeginMask() & 2 else int(begin[1])
        last = time if options.EndMask() & 2 else int(end[1])
        first, last = (edge + time if edge < 0 else edge for edge in (first, last))
        if operator.inputs[0] in self.scattered:
            found = self.scattered[operator.inputs[0]]
            stride = found[0].options(tflite.TransposeConvOptions).StrideH()
            if first == 0 and last == time - stride:
                self._set(operator, found[1])
                self.through[operator.outputs[0]] = found[0].outputs[0]
            elif first == time - stride and last == time:
                self.ends[operator.outputs[0]] = found
            else:
                raise Unsupported(f"{operator} cuts a sum of overlaps elsewhere than at its tail")
            return
        # The length of what is cut is known for one frame only: all but so many steps, or the last so many.
        if last == time and first > 0:
            first, last = first - time, END
        elif first == 0 and last < time:
            last -= time
        else:
            raise Unsupported(f"{operator} cuts time out of the middle")
        cut = [self._constant([first]), self._constant([last]), self._constant([AXES[1]])]
        self._set(operator, self._node("Slice", [self._value(operator, 0), *cut]))

    def _concatenation(self, operator: Operator) -> None:
        options = operator.options(tflite.ConcatenationOptions)
        _plain(operator, options)
        axis = AXES[options.Axis()]
        constants = [self.graph.constant(tensor) for tensor in operator.inputs]
        if all(constant is None for constant in constants):
            values = [self._value(operator, position) for position in range(len(operator.inputs))]
            self._set(operator, self._node("Concat", values, axis=axis))
            return
        if len(constants) != 2 or constants[0] is not None or constants[1].any() or axis != AXES[1]:
            raise Unsupported(f"{operator} joins constants that are not zeros at the end of time")
        self.tails[operator.outputs[0]] = self._value(operator, 0), self.graph.shape(operator.inputs[0])[1]

    def _split(self, operator: Operator) -> None:
        axis = self.graph.constant(operator.inputs[0])
        if axis is None or int(axis) not in (3, -1):
            raise Unsupported(f"{operator} doesn't split channels")
        sizes = [self.graph.shape(tensor)[3] for tensor in operator.outputs]
        parts = self._node("Split", [self._value(operator, 1), self._constant(sizes)], len(sizes), axis=AXES[3])
        self.names.update(zip(operator.outputs, parts, strict=True))

    # ---- arithmetic

    def _leaky_relu(self, operator: Operator) -> None:
        alpha = operator.options(tflite.LeakyReluOptions).Alpha()
        self._set(operator, self._node("LeakyRelu", [self._value(operator, 0)], alpha=alpha))

    def _add(self, operator: Operator) -> None:
        self._elementwise(operator, "Add", tflite.AddOptions)

    def _sub(self, operator: Operator) -> None:
        self._elementwise(operator, "Sub", tflite.SubOptions)

    def _elementwise(self, operator: Operator, kind: str, options: type) -> None:
        """Of two values of one shape, or of a value and a constant a channel."""
        _plain(operator, operator.options(options))
        second = operator.inputs[1]
        if second in self.tails and kind == "Add":
            self._overlap(operator)
            return
        if operator.inputs[0] in self.ends and kind == "Sub":
            self._next_tail(operator)
            return
        if self.graph.constant(second) is None:
            if self.graph.shape(second) != self.graph.shape(operator.inputs[0]):
                raise Unsupported(f"{operator} broadcasts")
            right = self._value(operator, 1)
        else:
            constant = self.graph.values(second)
            if constant.ndim != 1:
                raise Unsupported(f"{operator} has a constant of shape {list(constant.shape)}; one value a channel is needed")
            right = self._constant(constant.reshape(1, -1, 1, 1))
        self._set(operator, self._node(kind, [self._value(operator, 0), right]))

    def _overlap(self, operator: Operator) -> None:
        """What the frame before has left is added to the first steps of a transposed convolution."""
        tail, steps = self.tails[operator.inputs[1]]
        axis, begin, end = (self._constant([at]) for at in (AXES[1], 0, END))
        if operator.inputs[0] not in self.upsampled:
            value, edge = self._value(operator, 0), self._constant([steps])
            first = self._node("Add", [self._node("Slice", [value, begin, edge, axis]), tail])
            self._set(operator, self._node("Concat", [first, self._node("Slice", [value, edge, end, axis])], axis=AXES[1]))
            return
        source, now, later = self.upsampled[operator.inputs[0]]
        both, edge = self._node("Concat", [tail, later], axis=AXES[1]), self._constant([-steps])
        first = self._node("Add", [now, self._node("Slice", [both, begin, edge, axis])])
        self.scattered[operator.outputs[0]] = source, first, self._node("Slice", [both, edge, end, axis])

    def _next_tail(self, operator: Operator) -> None:
        """The end of such a sum without the bias, which is only in what comes out."""
        source, _, tail = self.ends[operator.inputs[0]]
        taken, bias = self.graph.values(operator.inputs[1]), self.graph.values(source.inputs[3])
        # Where the bias is quantized, the two differ by its rounding.
        if not np.allclose(taken, bias, rtol=0, atol=1e-2 * np.abs(bias).max()):
            raise Unsupported(f"{operator} takes something else than the bias of {source} off what is kept of it")
        self._set(operator, tail)
        self.through[operator.outputs[0]] = source.outputs[0]

    # ---- convolutions over time; the second spatial dimension is 1 throughout

    def _conv_2d(self, operator: Operator) -> None:
        options = operator.options(tflite.Conv2DOptions)
        _plain(operator, options)
        weights = self.graph.values(operator.inputs[1])  # [out, kernel, 1, in of the group]
        channels = self.graph.shape(operator.inputs[0])[3]
        if weights.shape[2] != 1 or channels % weights.shape[3]:
            raise Unsupported(f"{operator} has filters of {list(weights.shape)} over {channels} channels")
        self._convolution(operator, options, weights.transpose(0, 3, 2, 1), channels // weights.shape[3])

    def _depthwise_conv_2d(self, operator: Operator) -> None:
        options = operator.options(tflite.DepthwiseConv2DOptions)
        _plain(operator, options)
        weights = self.graph.values(operator.inputs[1])  # [1, kernel, 1, channels]
        if options.DepthMultiplier() != 1 or weights.shape[2] != 1:
            raise Unsupported(f"{operator} has a depth multiplier of {options.DepthMultiplier()} and filters of {list(weights.shape)}")
        self._convolution(operator, options, weights.transpose(3, 0, 2, 1), weights.shape[3])

    def _convolution(self, operator: Operator, options, weights: np.ndarray, groups: int) -> None:
        """`weights`: [out, in of the group, 1, kernel]."""
        value = self._node(
            "Conv",
            [self._value(operator, 0), self._constant(weights), self._bias(operator, 2)],
            kernel_shape=[1, weights.shape[3]],
            strides=[1, options.StrideH()],
            dilations=[1, options.DilationHFactor()],
            group=groups,
        )
        self._set(operator, value)

    def _transpose_conv(self, operator: Operator) -> None:
        options = operator.options(tflite.TransposeConvOptions)
        _plain(operator, options)
        weights = self.graph.values(operator.inputs[1])  # [out, kernel, 1, in]
        kernel, stride = weights.shape[1], options.StrideH()
        before, after = self.graph.shape(operator.inputs[2])[1], self.graph.shape(operator.outputs[0])[1]
        if weights.shape[2] != 1 or after != (before - 1) * stride + kernel:
            raise Unsupported(f"{operator} makes {after} steps of {before} with a kernel of {kernel} and a stride of {stride}")
        if kernel == 2 * stride:
            self._upsample(operator, weights, stride)
            return
        value = self._node(
            "ConvTranspose",
            [self._value(operator, 2), self._constant(weights.transpose(3, 0, 2, 1)), self._bias(operator, 3)],
            kernel_shape=[1, kernel],
            strides=[1, stride],
        )
        self._set(operator, value)

    def _upsample(self, operator: Operator, weights: np.ndarray, stride: int) -> None:
        """As a convolution with a kernel of 1 whose outputs are the steps: ONNX Runtime's ConvTranspose is several times slower."""
        channels, kernel, _, inputs = weights.shape
        # Outputs in the order [half, channel, step of the half]; the bias is that of the first half.
        kernels = weights.reshape(channels, 2, stride, inputs).transpose(1, 0, 2, 3).reshape(channels * kernel, inputs, 1, 1)
        bias = np.repeat(self.graph.values(operator.inputs[3]), stride)
        value = self._node(
            "Conv",
            [self._value(operator, 2), self._constant(kernels), self._constant(np.concatenate([bias, np.zeros_like(bias)]))],
            kernel_shape=[1, 1],
        )
        value = self._node("Reshape", [value, self._constant([0, 2 * channels, stride, -1])])
        value = self._node("Transpose", [value], perm=[0, 1, 3, 2])
        value = self._node("Reshape", [value, self._constant([0, 2 * channels, 1, -1])])
        now, later = self._node("Split", [value, self._constant([channels, channels])], 2, axis=1)
        self.upsampled[operator.outputs[0]] = operator, now, later


def _states(subgraphs: list[Subgraph]) -> list[State]:
    """The variables in the order of the main graph, and a check that their initialisation sets every one to zeros."""
    shapes: dict[str, list[int]] = {}
    zeroed = set()
    for index, graph in enumerate(subgraphs):
        handles = {}
        for operator in graph.operators():
            if operator.name == "VAR_HANDLE":
                handles[operator.outputs[0]] = _variable(operator)
                if index == 0:
                    shapes.setdefault(_variable(operator), [])
            elif operator.name == "READ_VARIABLE" and index == 0:
                shapes[handles[operator.inputs[0]]] = graph.shape(operator.outputs[0])
            elif operator.name == "ASSIGN_VARIABLE" and index > 0:
                initial = graph.constant(operator.inputs[1])
                if initial is None or initial.any():
                    raise Unsupported(f"variable {handles[operator.inputs[0]]} doesn't start as zeros")
                zeroed.add(handles[operator.inputs[0]])
    states, offset = [], 0
    for name, shape in shapes.items():
        if name not in zeroed:
            raise Unsupported(f"variable {name} is never initialised")
        if len(shape) != 4 or shape[0] != 1 or shape[2] != 1:
            raise Unsupported(f"variable {name} has shape {shape}; [1, time, 1, channels] is needed")
        states.append(State(name, shape[3], shape[1], offset))
        offset += states[-1].size
    return states


def _variable(operator: Operator) -> str:
    return operator.options(tflite.VarHandleOptions).SharedName().decode()


def _plain(operator: Operator, options) -> None:
    """Refuses padding that depends on the position in the stream and activations fused into an operator."""
    if options.FusedActivationFunction() != NO_ACTIVATION:
        raise Unsupported(f"{operator} has a fused activation")
    if hasattr(options, "Padding") and options.Padding() != VALID:
        raise Unsupported(f"{operator} pads its input")


def _size(shape: list[int]) -> int:
    return int(np.prod(shape))


def _value(name: str, size: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])

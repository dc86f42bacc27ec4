"""Reads a TFLite flatbuffer: operators in order of execution, shapes, constants, and constants as f32 where they are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tflite

OPERATORS = {code: name for name, code in vars(tflite.BuiltinOperator).items() if isinstance(code, int)}
TYPES = {
    tflite.TensorType.FLOAT32: np.dtype("<f4"),
    tflite.TensorType.INT32: np.dtype("<i4"),
    tflite.TensorType.INT8: np.dtype("i1"),
}


class Unsupported(Exception):
    """The graph holds something that the converter doesn't know how to express. Says where and what."""


@dataclass(frozen=True)
class Operator:
    """One operator; `inputs` and `outputs` are tensor numbers of its subgraph, -1 for an input left out."""

    index: int
    name: str
    inputs: list[int]
    outputs: list[int]
    raw: tflite.Operator

    def options(self, kind: type):
        """Its options, read as the table `kind` of the schema, for instance `tflite.Conv2DOptions`."""
        table = self.raw.BuiltinOptions()
        if table is None:
            raise Unsupported(f"{self} has no options")
        options = kind()
        options.Init(table.Bytes, table.Pos)
        return options

    def __str__(self) -> str:
        return f"operator {self.index} ({self.name})"


class Subgraph:
    """One subgraph of a model; TFLite keeps activations as [1, time, 1, channels]."""

    def __init__(self, model: tflite.Model, index: int) -> None:
        self.model = model
        self.graph = model.Subgraphs(index)
        self.inputs = [int(i) for i in self.graph.InputsAsNumpy()] if self.graph.InputsLength() else []
        self.outputs = [int(i) for i in self.graph.OutputsAsNumpy()] if self.graph.OutputsLength() else []

    def operators(self) -> Iterator[Operator]:
        for index in range(self.graph.OperatorsLength()):
            raw = self.graph.Operators(index)
            code = self.model.OperatorCodes(raw.OpcodeIndex())
            # Old writers fill the 8-bit field only; the newer field is then 0.
            name = OPERATORS[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
            inputs = [int(raw.Inputs(i)) for i in range(raw.InputsLength())]
            outputs = [int(raw.Outputs(i)) for i in range(raw.OutputsLength())]
            yield Operator(index, name, inputs, outputs, raw)

    def name(self, tensor: int) -> str:
        return self.graph.Tensors(tensor).Name().decode()

    def shape(self, tensor: int) -> list[int]:
        held = self.graph.Tensors(tensor)
        return [int(size) for size in held.ShapeAsNumpy()] if held.ShapeLength() else []

    def constant(self, tensor: int) -> np.ndarray | None:
        """The tensor's value as stored; None where it is computed."""
        held = self.graph.Tensors(tensor)
        buffer = self.model.Buffers(held.Buffer())
        if not buffer.DataLength():
            return None
        if held.Type() not in TYPES:
            raise Unsupported(f"constant {self.name(tensor)} has type {held.Type()} of the schema's TensorType")
        return buffer.DataAsNumpy().view(TYPES[held.Type()]).reshape(self.shape(tensor))

    def values(self, tensor: int) -> np.ndarray:
        """A constant as f32: int8 weights and int32 biases are multiplied out by their scales (per tensor or per channel)."""
        stored = self.constant(tensor)
        if stored is None:
            raise Unsupported(f"tensor {tensor} ({self.name(tensor)}) is computed where a constant is needed")
        if stored.dtype == np.float32:
            return stored
        quantization = self.graph.Tensors(tensor).Quantization()
        if quantization is None or not quantization.ScaleLength():
            raise Unsupported(f"constant {self.name(tensor)} is {stored.dtype} without a scale")
        scale = quantization.ScaleAsNumpy().astype(np.float32)
        zero = quantization.ZeroPointAsNumpy().astype(np.float32)
        if len(scale) > 1:
            along = [1] * stored.ndim
            along[quantization.QuantizedDimension()] = -1
            scale, zero = scale.reshape(along), zero.reshape(along)
        return ((stored.astype(np.float32) - zero) * scale).astype(np.float32)


def load(content: bytes | Path) -> list[Subgraph]:
    """The subgraphs of a TFLite file, the main one first."""
    data = content.read_bytes() if isinstance(content, Path) else content
    if data[4:8] != b"TFL3":
        raise Unsupported("this is no TFLite file: its identifier isn't TFL3")
    model = tflite.Model.GetRootAsModel(data, 0)
    return [Subgraph(model, index) for index in range(model.SubgraphsLength())]

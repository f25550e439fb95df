"""The TensorRT families, and the ONNX operators that each of them imports.

Sources: for TensorRT, `docs/operators.md` and `docs/Changelog.md` of onnx-tensorrt 10.15, its importers at 10.1 where
the document is silent, the plugin table of TensorRT's `plugin/README.md`, and for 11 the ONNX Opset Guide of its
documentation. For TensorRT-RTX, what the parsers of 1.5.0.114 and 1.7.1.116 say of ONNX's own operator tests, and what
the builders make of one-operator models (compute capabilities 8.0, 8.9 and 12.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["tensorrt_10", "tensorrt_11", "tensorrt_rtx", "dla"]


@dataclass(frozen=True)
class Family:
    """One TensorRT, as far as what it takes goes.

    Parameters
    ----------
    module
        The Python module that it comes as.
    title
        What messages call it.
    table
        Which releases its table was read from or measured with.
    newest
        The newest release that the table knows; what only a builder refuses may have changed in a later one.
    opset
        The newest ONNX opset that the table covers: of operators that ONNX got later, it knows nothing.
    operators
        ONNX's own operators that it imports.
    contrib
        Operators of the domain `com.microsoft` that it imports on purpose.
    plugins
        The operators of the plugin library that comes with it, of any domain.
    """

    name: FamilyName
    module: str
    title: str
    table: str
    newest: tuple[int, ...]
    opset: int
    operators: frozenset[str]
    contrib: frozenset[str] = frozenset()
    plugins: frozenset[str] = frozenset()

    def knows(self, release: tuple[int, ...]) -> bool:
        """Whether the table was made with this release or a later one."""
        return release[: len(self.newest)] <= self.newest


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMON = _names(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow
    Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace
    DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If ImageScaler
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu
    Pad ParametricSoftplus Pow QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RotaryEmbedding Round STFT ScaledTanh Scan
    Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze
    Upsample Where Xor
    """
)
_TENSORRT = _COMMON | _names("DeformConv NonMaxSuppression NonZero RoiAlign Swish")
"""Swish (opset 24) stands in no document; a refusal would be a guess."""
_TENSORRT_PLUGINS = _names(
    """
    BatchTilePlugin_TRT BatchedNMS_TRT BatchedNMSDynamic_TRT CustomQKVToContextPluginDynamic Clip_TRT CoordConvAC
    CropAndResize CropAndResizeDynamic DecodeBbox3DPlugin DetectionLayer_TRT DisentangledAttention_TRT EfficientNMS_TRT
    EfficientNMS_ONNX_TRT CustomEmbLayerNormPluginDynamic CustomFCPluginDynamic FlattenConcat_TRT
    CustomGeluPluginDynamic GenerateDetection_TRT GridAnchor_TRT GridAnchorRect_TRT GroupNormalizationPlugin
    InstanceNormalization_TRT LReLU_TRT ModulatedDeformConv2d MultilevelCropAndResize_TRT MultilevelProposeROI_TRT
    MultiscaleDeformableAttnPlugin_TRT NMS_TRT NMSDynamic_TRT Normalize_TRT RPROI_TRT PillarScatterPlugin PriorBox_TRT
    ProposalLayer_TRT Proposal ProposalDynamic PyramidROIAlign_TRT Region_TRT Reorg_TRT ROIAlign_TRT ResizeNearest_TRT
    CustomSkipLayerNormPluginDynamic SpecialSlice_TRT VoxelGeneratorPlugin
    """
)

TENSORRT_10 = Family(
    name="tensorrt_10",
    module="tensorrt",
    title="TensorRT 10",
    table="onnx-tensorrt's operator table of TensorRT 10.15",
    newest=(10, 15),
    opset=24,
    operators=_TENSORRT,
    plugins=_TENSORRT_PLUGINS,
)
TENSORRT_11 = Family(
    name="tensorrt_11",
    module="tensorrt",
    title="TensorRT 11",
    table="onnx-tensorrt's operator table of TensorRT 10.15 and TensorRT 11's opset guide",
    newest=(11, 4),
    opset=25,
    operators=_TENSORRT,
    plugins=_TENSORRT_PLUGINS,
)
RTX = Family(
    name="tensorrt_rtx",
    module="tensorrt_rtx",
    title="TensorRT-RTX",
    table="what was measured with TensorRT-RTX 1.5.0.114 and 1.7.1.116",
    newest=(1, 7),
    opset=28,
    # RoiAlign by the release notes of 1.5: without a driver its parser cannot tell.
    operators=_COMMON | _names("RoiAlign SimplifiedLayerNormalization Swish"),
    contrib=_names("GroupQueryAttention MultiHeadAttention RotaryEmbedding SkipSimplifiedLayerNormalization"),
)
FAMILIES: tuple[Family, ...] = (TENSORRT_10, TENSORRT_11, RTX)
"""The families that an engine can be built with; a model that none of them takes is an error on any machine."""

DLA = Family(
    name="dla",
    module="tensorrt",
    title="DLA",
    table="TensorRT's page DLA Supported Layers and Restrictions (Jetson and DriveOS)",
    newest=(11, 4),
    opset=25,
    operators=_names(
        """
        Abs Add Atan AveragePool BatchNormalization Clip Concat Constant Conv ConvTranspose Cos DequantizeLinear Div
        Equal Flatten GlobalAveragePool GlobalMaxPool Greater Identity LRN LeakyRelu Less Max MaxPool Min Mul PRelu Pow
        QuantizeLinear ReduceMax Relu Reshape Resize Sigmoid Sin Slice Softmax Squeeze Sub Sum Tanh Transpose Unsqueeze
        Upsample
        """
    ),
)
"""No family of its own: what the DLA of a Jetson does not take falls back to the GPU beside it."""


def family_of(module: str, version: str) -> Family:
    """The family of an installed TensorRT.

    Parameters
    ----------
    module
        `tensorrt` or `tensorrt_rtx`.
    version
        As the module says it, "10.3.0".
    """
    if module == "tensorrt_rtx":
        return RTX
    return TENSORRT_10 if version.startswith("10.") else TENSORRT_11

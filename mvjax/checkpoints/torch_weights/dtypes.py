"""One type, three names: NumPy's, PyTorch's and that of safetensors."""

from typing import NamedTuple

import ml_dtypes
import numpy as np


class TypeNames(NamedTuple):
    """How the two formats call a NumPy type.

    Attributes:
        torch: attribute of the `torch` module, e.g. "bfloat16".
        storage: the storage class that `torch.save` names in the pickle; None for the types added
            since PyTorch 2.1, which are saved as untyped bytes beside their torch name.
        safetensors: code in the header; None if that format lacks the type.
    """

    torch: str
    storage: str | None
    safetensors: str | None


TYPE_NAMES = {
    np.dtype(kind): TypeNames(*names)
    for kind, *names in (
        (np.float64, "float64", "DoubleStorage", "F64"),
        (np.float32, "float32", "FloatStorage", "F32"),
        (np.float16, "float16", "HalfStorage", "F16"),
        (ml_dtypes.bfloat16, "bfloat16", "BFloat16Storage", "BF16"),
        (np.int64, "int64", "LongStorage", "I64"),
        (np.int32, "int32", "IntStorage", "I32"),
        (np.int16, "int16", "ShortStorage", "I16"),
        (np.int8, "int8", "CharStorage", "I8"),
        (np.uint8, "uint8", "ByteStorage", "U8"),
        (np.bool_, "bool", "BoolStorage", "BOOL"),
        (np.complex64, "complex64", "ComplexFloatStorage", "C64"),
        (np.complex128, "complex128", "ComplexDoubleStorage", None),
        (np.uint16, "uint16", None, "U16"),
        (np.uint32, "uint32", None, "U32"),
        (np.uint64, "uint64", None, "U64"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn", None, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "float8_e5m2", None, "F8_E5M2"),
        (ml_dtypes.float8_e4m3fnuz, "float8_e4m3fnuz", None, "F8_E4M3FNUZ"),
        (ml_dtypes.float8_e5m2fnuz, "float8_e5m2fnuz", None, "F8_E5M2FNUZ"),
        (ml_dtypes.float8_e8m0fnu, "float8_e8m0fnu", None, "F8_E8M0"),
    )
}

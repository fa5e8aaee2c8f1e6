"""Floats of 8 and 4 bits, widened exactly: what a code of a quantized tensor, or a scale, stands for."""

from __future__ import annotations

from tilewright.codegen.mlir.value import Val, constant

F8_FACTORS = {"f8e4m3": 256.0, "f8e5m2": 1.0}
"""What ``widen_f8`` leaves numbers to be multiplied by: the exponent of f16 reaches further than that of the code."""


def widen_f8(code: Val, dtype: str) -> Val:
    """A float of 8 bits in the lower half of an i16 -> f32, divided by `F8_FACTORS`: its bits are also those of an f16."""
    if dtype == "f8e5m2":
        return (code << 8).bitcast("f16").to("f32")
    number = (code << 7) & 0x3F80
    nan = (number + 0x80) & 0x4000  # only the largest code reaches this bit, which makes it a NaN of f16
    return (number | nan | ((code << 8) & -0x8000)).bitcast("f16").to("f32")


def widen_f8e8m0(exponent: Val) -> Val:
    """A power of two, of which the u8 is the exponent, -> f32; 255 is no number."""
    wide = exponent.to("i32")
    bits = (wide << 23).max(1 << 22)  # the least is no normal number: 2**-127
    return wide.eq(255).select(constant(0x7FC00000, "i32", wide.lanes), bits).bitcast("f32")


def widen_f4e2m1(code: Val) -> Val:
    """The float of 4 bits that is the lower half of a u8 -> f32."""
    wide = code.to("i32")
    number = wide & 7
    doubled = (number < 4).select(number, ((wide & 1) | 2) << (number.shift_right_logical(1) - 1).max(0))
    magnitude = (doubled.to("f32") * 0.5).bitcast("i32")
    return (magnitude | ((wide & 8) << 28)).bitcast("f32")

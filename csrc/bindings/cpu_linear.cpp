// SPDX-License-Identifier: MIT
// Linear layers for Python, and weights in the layouts of csrc/cpu/packed.h: arguments checked,
// params filled.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cpu_packed.h"
#include "memory.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tokenspeed::cpu {
namespace {

// Memory for a weight [out, in] or [count, out, in].
Packed make_packed(const Tensor& like, PackedWeight weight, int ndim) {
    expect(weight.in > 0, "weight", "has no inputs");
    Tensor data = like.empty({weight.count, weight.bytes_each()}, python::kUInt8);
    weight.data = data.data<char>();
    advise_huge_pages(weight.data, static_cast<size_t>(weight.count * weight.bytes_each()));
    return {weight, ndim, data.object()};
}

// [out, in] or [count, out, in] of `t`, whose last axis holds `per` elements of the weight each.
PackedWeight sizes_of(const Tensor& t, const char* name, int64_t per) {
    const int ndim = t.ndim();
    if (ndim != 2 && ndim != 3) {
        refuse(name, "expected [out, in] or [count, out, in], got " + t.shape_text());
    }
    expect(t.dense_from(0), name, "must be contiguous");
    PackedWeight weight{};
    weight.count = ndim == 3 ? t.size(0) : 1;
    weight.out = t.size(ndim - 2);
    weight.in = t.size(ndim - 1) * per;
    return weight;
}

Packed pack(const Tensor& weight) {
    PackParams p{};
    p.weight = sizes_of(weight, "weight", 1);
    p.weight.format = Format::kPlain;
    p.weight.dtype = float_type(weight, "weight");
    p.weight.group = p.weight.in;
    Packed packed = make_packed(weight, p.weight, weight.ndim());
    p.weight = packed.weight;
    p.elements = weight.data<void>();
    run(kernels().pack, p);
    return packed;
}

Format format_of(int bits) {
    expect(bits == 8 || bits == 4, "bits", "expected 8 or 4");
    return bits == 8 ? Format::kInt8 : Format::kInt4;
}

void expect_group(int64_t group, int64_t in) {
    expect(group >= 32 && group % 32 == 0, "group", "must be a multiple of 32");
    if (in % group != 0) {
        refuse("group",
               std::to_string(group) + " does not divide " + std::to_string(in) + " inputs");
    }
}

Packed pack_codes(const Tensor& codes, const Tensor& scales, int bits, int64_t group) {
    PackParams p{};
    const Format format = format_of(bits);
    expect_type(codes, "codes", bits == 8 ? python::kInt8 : python::kUInt8);
    p.weight = sizes_of(codes, "codes", bits == 8 ? 1 : 2);
    p.weight.format = format;
    p.weight.group = group;
    expect_group(group, p.weight.in);
    expect_type(scales, "scales", python::kBFloat16);
    if (codes.ndim() == 2) {
        expect_shape(scales, "scales", {p.weight.out, p.weight.in / group});
    } else {
        expect_shape(scales, "scales", {p.weight.count, p.weight.out, p.weight.in / group});
    }
    Packed packed = make_packed(codes, p.weight, codes.ndim());
    p.weight = packed.weight;
    p.elements = codes.data<void>();
    p.scales = scales.data<void>();
    run(kernels().pack, p);
    return packed;
}

nb::tuple quantize(const Tensor& weight, int bits, int64_t group) {
    QuantizeParams p{};
    const PackedWeight sizes = sizes_of(weight, "weight", 1);
    p.dtype = float_type(weight, "weight");
    p.format = format_of(bits);
    expect_group(group, sizes.in);
    p.num_rows = sizes.count * sizes.out;
    p.in = sizes.in;
    p.group = group;
    p.x = weight.data<void>();
    const int64_t width = bits == 8 ? sizes.in : sizes.in / 2, groups = sizes.in / group;
    const python::Type& type = bits == 8 ? python::kInt8 : python::kUInt8;
    const bool flat = weight.ndim() == 2;
    Tensor codes = flat ? weight.empty({sizes.out, width}, type)
                        : weight.empty({sizes.count, sizes.out, width}, type);
    Tensor scales = flat ? weight.empty({sizes.out, groups}, python::kBFloat16)
                         : weight.empty({sizes.count, sizes.out, groups}, python::kBFloat16);
    p.codes = codes.data<void>();
    p.scales = scales.data<void>();
    run(kernels().quantize, p);
    return nb::make_tuple(codes.object(), scales.object());
}

// ---- Products ----------------------------------------------------------------------------------

const python::Type& type_of(DType dtype) {
    return dtype == DType::kFloat32 ? python::kFloat32 : python::kBFloat16;
}

nb::object linear_packed(const Tensor& x, const Packed& packed, const std::optional<Tensor>& bias,
                         bool wide) {
    PackedLinearParams p{};
    p.weight = packed.weight;
    p.dtype = float_type(x, "x");
    expect(packed.ndim == 2, "weight", "expected one weight, got a stack");
    expect_shape(x, "x", {kAny, p.weight.in}, 1);
    p.num_tokens = x.size(0);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    if (bias) {
        expect_same(*bias, "bias", p.dtype);
        expect_shape(*bias, "bias", {p.weight.out});
        p.bias = bias->data<void>();
    }
    const bool mixed = p.weight.format == Format::kPlain && p.weight.dtype == DType::kFloat32;
    p.out_dtype = wide || mixed ? DType::kFloat32 : p.dtype;
    Tensor out = x.empty({p.num_tokens, p.weight.out}, type_of(p.out_dtype));
    p.out = out.data<void>();
    run(kernels().linear_packed, p);
    return out.object();
}

nb::object head_linear_packed(const Tensor& x, const Packed& packed) {
    PackedLinearParams p{};
    p.weight = packed.weight;
    p.dtype = float_type(x, "x");
    expect(packed.ndim == 3, "weight", "expected a weight for each head");
    expect_shape(x, "x", {kAny, p.weight.count, p.weight.in}, 2);
    p.num_tokens = x.size(0);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.x_head_stride = x.stride(1);
    p.out_dtype = p.dtype;
    Tensor out = x.empty({p.num_tokens, p.weight.count, p.weight.out});
    p.out = out.data<void>();
    run(kernels().linear_packed, p);
    return out.object();
}

// A weight as it stands, for those that are also read otherwise (a tied embedding).
nb::object linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  bool wide) {
    LinearParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny}, 1);
    p.num_tokens = x.size(0);
    p.in = x.size(1);
    expect(p.in > 0, "x", "has no inputs");
    expect_same(weight, "weight", p.dtype);
    expect_shape(weight, "weight", {kAny, p.in});
    p.num_heads = 1;
    p.out_size = weight.size(0);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.weight = weight.data<void>();
    if (bias) {
        expect_same(*bias, "bias", p.dtype);
        expect_shape(*bias, "bias", {p.out_size});
        p.bias = bias->data<void>();
    }
    p.out_dtype = wide ? DType::kFloat32 : p.dtype;
    Tensor out = x.empty({p.num_tokens, p.out_size}, type_of(p.out_dtype));
    p.out = out.data<void>();
    run(kernels().linear, p);
    return out.object();
}

nb::object head_linear(const Tensor& x, const Tensor& weight) {
    LinearParams p{};
    p.dtype = float_type(x, "x");
    expect_shape(x, "x", {kAny, kAny, kAny}, 2);
    p.num_tokens = x.size(0);
    p.num_heads = x.size(1);
    p.in = x.size(2);
    expect(p.in > 0, "x", "has no inputs");
    expect_same(weight, "weight", p.dtype);
    expect_shape(weight, "weight", {p.num_heads, kAny, p.in});
    p.out_size = weight.size(1);
    p.x = x.data<void>();
    p.x_stride = x.stride(0);
    p.x_head_stride = x.stride(1);
    p.weight = weight.data<void>();
    p.out_dtype = p.dtype;
    Tensor out = x.empty({p.num_tokens, p.num_heads, p.out_size});
    p.out = out.data<void>();
    run(kernels().linear, p);
    return out.object();
}

}  // namespace

void bind_linear(nb::module_& m) {
    nb::class_<Packed>(m, "PackedWeight", "A weight in the layout that the kernels stream.")
        .def_prop_ro("shape", &Packed::shape)
        .def_prop_ro("data", [](const Packed& p) { return p.data; })
        .def_prop_ro("num_bytes",
                     [](const Packed& p) { return p.weight.count * p.weight.bytes_each(); });
    def_op(m, "pack", &pack, "weight"_a);
    def_op(m, "pack_codes", &pack_codes, "codes"_a, "scales"_a, "bits"_a, "group"_a);
    def_op(m, "quantize", &quantize, "weight"_a, "bits"_a, "group"_a);
    def_op(m, "linear", &linear, "x"_a, "weight"_a, "bias"_a.none() = nb::none(), "wide"_a = false);
    def_op(m, "linear", &linear_packed, "x"_a, "weight"_a, "bias"_a.none() = nb::none(),
           "wide"_a = false);
    def_op(m, "head_linear", &head_linear, "x"_a, "weight"_a);
    def_op(m, "head_linear", &head_linear_packed, "x"_a, "weight"_a);
}

}  // namespace tokenspeed::cpu

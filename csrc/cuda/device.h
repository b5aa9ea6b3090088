// SPDX-License-Identifier: MIT
// What kernels use of the device, by name: places in the grid, barriers, shuffles, clusters, launch
// order. With nvcc these are instructions of sm_90; a host compiler takes tests/cpp/cuda_machine.h
// instead, which runs a kernel's own source on threads. Knows no kernel.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

// TS_KERNEL(threads, cluster) void name(params): clusters of CTAs along x.
#define TS_KERNEL(threads, cluster) \
    extern "C" __global__ void __launch_bounds__(threads, 1) __cluster_dims__(cluster, 1, 1)
#define TS_PARAMS(type) const __grid_constant__ type
#define TS_DEVICE __device__ __forceinline__
#define TS_UNROLL(count) _Pragma(TS_TEXT(unroll count))
#define TS_TEXT(text) #text

namespace tokenspeed::cuda {

struct alignas(16) Float4 {
    float x, y, z, w;
};

struct alignas(16) Word4 {
    uint32_t x, y, z, w;
};

TS_DEVICE int32_t ThreadX() { return static_cast<int32_t>(threadIdx.x); }
TS_DEVICE int32_t BlockX() { return static_cast<int32_t>(blockIdx.x); }
TS_DEVICE int32_t BlockY() { return static_cast<int32_t>(blockIdx.y); }
TS_DEVICE int32_t GridY() { return static_cast<int32_t>(gridDim.y); }

// The CTA's shared memory, given at launch.
template <class T>
TS_DEVICE T& SharedMemory() {
    extern __shared__ __align__(16) uint8_t bytes[];
    return *reinterpret_cast<T*>(bytes);
}

TS_DEVICE void SyncThreads() { __syncthreads(); }

template <class T>
TS_DEVICE T ShuffleXor(T value, int32_t mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

TS_DEVICE float Exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

TS_DEVICE int32_t ClusterRank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int32_t>(rank);
}

// All threads of the cluster; shared memory written before is seen after, in every CTA.
TS_DEVICE void SyncCluster() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

// *target, an address of shared memory, in the CTA of that rank.
TS_DEVICE void StoreInCluster(float* target, int32_t rank, float value) {
    const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
}

// Programmatic dependent launch: until the first, nothing that the kernel ahead writes may be read;
// from the second on the kernel behind may be set up.
TS_DEVICE void WaitForKernelAhead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
TS_DEVICE void ReleaseKernelBehind() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Loads past the first cache, of what another kernel wrote a moment ago.
TS_DEVICE Float4 LoadFloat4(const float* at) {
    Float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(at));
    return v;
}

// Loads of what nobody writes while the kernel runs.
TS_DEVICE Word4 LoadConstant4(const void* at) {
    Word4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

TS_DEVICE float AsFloat(uint32_t bits) { return __uint_as_float(bits); }
TS_DEVICE uint32_t AsBits(float value) { return __float_as_uint(value); }

}  // namespace tokenspeed::cuda

#else
#include "cuda_machine.h"
#endif

namespace tokenspeed::cuda {

// The two bfloat16 numbers of a word.
TS_DEVICE float LowHalf(uint32_t word) { return AsFloat(word << 16); }
TS_DEVICE float HighHalf(uint32_t word) { return AsFloat(word & 0xFFFF0000u); }

// Rounded to nearest even; NaN stays NaN.
TS_DEVICE uint16_t ToBfloat16(float value) {
    const uint32_t bits = AsBits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace tokenspeed::cuda

// SPDX-License-Identifier: MIT
// The schedule of latent attention on a GPU: which units of work each CTA has, worked out by every
// CTA for itself. The same arithmetic as tokenspeed/kernels/mla_schedule_gluon.py; see there for
// the picture. Knows no attention, and compiles for the host too, where it is tested.
//
//   row:  a request's query tokens; its query rows (tokens x heads) are cut into blocks, its keys
//         into tiles of kTile. A unit is one tile under one block.
//   item: a block's place in the line of all blocks. A CTA and an item that share units have one
//         partial result, in slot cta + item.
//
// Invariants: spans of CTAs follow each other without gaps, each of floor or ceil(total / parts)
// units; Owner(u) is the only CTA whose span holds u; slots of different (CTA, item) pairs differ.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TS_HOST_DEVICE inline
#endif

namespace tokenspeed::cuda {

constexpr int32_t kTile = 64;  // keys of a unit

struct RowWork {
    int32_t blocks;
    int32_t tiles;

    TS_HOST_DEVICE int32_t units() const { return blocks * tiles; }
};

TS_HOST_DEVICE int32_t CeilDiv(int32_t value, int32_t divisor) {
    return (value + divisor - 1) / divisor;
}

// Blocks of query rows and tiles of keys of a row; none of both if it lacks either.
TS_HOST_DEVICE RowWork WorkOf(int32_t queries, int32_t tokens, int32_t heads, int32_t block) {
    return {tokens > 0 ? CeilDiv(queries * heads, block) : 0,
            queries > 0 ? CeilDiv(tokens, kTile) : 0};
}

// CTAs that have work: all, or as many as there are units.
TS_HOST_DEVICE int32_t PartsOf(int32_t ctas, int32_t total) { return ctas < total ? ctas : total; }

// The first unit of a CTA; that of CTA `parts` is the end.
TS_HOST_DEVICE int32_t SpanStart(int32_t cta, int32_t total, int32_t parts) {
    return static_cast<int32_t>(static_cast<int64_t>(cta) * total / (parts > 0 ? parts : 1));
}

// The CTA that computes a unit. REQUIRES: 0 <= unit < total.
TS_HOST_DEVICE int32_t Owner(int32_t unit, int32_t total, int32_t parts) {
    return static_cast<int32_t>(((unit + int64_t{1}) * parts - 1) / total);
}

TS_HOST_DEVICE int32_t SlotOf(int32_t cta, int32_t item) { return cta + item; }

// Tiles with a key that the last query row of a block may see; 1 at least.
TS_HOST_DEVICE int32_t VisibleTiles(int32_t block_index, int32_t queries, int32_t tokens,
                                    int32_t heads, int32_t block) {
    const int32_t reach = CeilDiv((block_index + 1) * block, heads);
    const int32_t last = reach < queries ? reach : queries;
    return CeilDiv(tokens - queries + last, kTile);
}

// Where the partial results of one query row stand.
struct Partials {
    int32_t slot;   // of the first
    int32_t count;  // in slots that follow each other
    int32_t line;   // the row's place in a slot
};

// What stands in the line before a row of the batch.
struct Before {
    int32_t units;
    int32_t items;
};

// REQUIRES: place is below queries * heads, and the row has tokens.
TS_HOST_DEVICE Partials PartialsOf(int32_t place, int32_t queries, int32_t tokens, Before before,
                                   int32_t total, int32_t ctas, int32_t heads, int32_t block) {
    const RowWork work = WorkOf(queries, tokens, heads, block);
    const int32_t parts = PartsOf(ctas, total);
    const int32_t index = place / block;
    const int32_t unit = before.units + index * work.tiles;
    const int32_t seen = VisibleTiles(index, queries, tokens, heads, block);
    const int32_t first = Owner(unit, total, parts);
    return {SlotOf(first, before.items + index), Owner(unit + seen - 1, total, parts) - first + 1,
            place % block};
}

}  // namespace tokenspeed::cuda

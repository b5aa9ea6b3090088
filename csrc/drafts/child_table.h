// SPDX-License-Identifier: MIT
// The edges of a suffix tree: (node, first token of the edge) -> child, in 8 bytes each. The token
// is not kept, as the child tells it; who calls says how (`first`). Open addressing, linear
// probing, no erasure. At most three quarters full, at least half unless reserved.
#pragma once

#include <vector>

#include "drafts/draft.h"

namespace tokenspeed::drafts {

class ChildTable {
  public:
    struct Edge {
        int32_t node = -1;  // -1: free
        int32_t child = 0;
    };

    explicit ChildTable(uint64_t seed) : seed_(seed), edges_(16) {}

    // The edge of `node` that begins with `token`; null if there is none.
    // first(node, child) is the first token of an edge.
    template <class First>
    const Edge* find(int32_t node, Token token, const First& first) const {
        uint32_t at = place(node, token);
        for (; edges_[at].node != -1; at = next(at)) {
            if (edges_[at].node == node && first(node, edges_[at].child) == token) {
                return &edges_[at];
            }
        }
        return nullptr;
    }

    // REQUIRES: `edge` comes from find(), and `child` begins with the same token.
    void replace(const Edge* edge, int32_t child) { edges_[edge - edges_.data()].child = child; }

    // REQUIRES: no such edge.
    template <class First>
    void insert(int32_t node, Token token, int32_t child, const First& first) {
        if ((num_edges_ + 1) * 4 > edges_.size() * 3) reserve(num_edges_ + num_edges_ / 2, first);
        put(node, token, child);
        ++num_edges_;
    }

    // Room for `num_edges` of them.
    template <class First>
    void reserve(size_t num_edges, const First& first) {
        const size_t size = num_edges / 3 * 4 + 16;
        if (size <= edges_.size()) return;
        std::vector<Edge> old(size);
        old.swap(edges_);
        for (const Edge& edge : old) {
            if (edge.node != -1) put(edge.node, first(edge.node, edge.child), edge.child);
        }
    }

    size_t num_bytes() const { return edges_.capacity() * sizeof(Edge); }

  private:
    uint32_t next(uint32_t at) const { return at + 1 == edges_.size() ? 0 : at + 1; }

    uint32_t place(int32_t node, Token token) const {
        const uint64_t key =
            uint64_t{static_cast<uint32_t>(node)} << 32 | static_cast<uint32_t>(token);
        return place_of(key, seed_, static_cast<uint32_t>(edges_.size()));
    }

    void put(int32_t node, Token token, int32_t child) {
        uint32_t at = place(node, token);
        while (edges_[at].node != -1) at = next(at);
        edges_[at] = {node, child};
    }

    uint64_t seed_;
    size_t num_edges_ = 0;
    std::vector<Edge> edges_;
};

}  // namespace tokenspeed::drafts

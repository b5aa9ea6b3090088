// SPDX-License-Identifier: MIT
#include "drafts/suffix_tree.h"

#include <stdexcept>

namespace tokenspeed::drafts {

namespace {

// Grows by a quarter: these vectors are long, and there are many of them.
template <class T>
void make_room(std::vector<T>& values) {
    if (values.size() == values.capacity()) values.reserve(values.size() + values.size() / 4 + 16);
}

}  // namespace

void SuffixTree::reserve(size_t num_tokens) {
    text_.reserve(num_tokens);
    // What texts and code take: half as many internal nodes as tokens.
    nodes_.reserve(num_tokens / 2);
    edges_.reserve(num_tokens + num_tokens / 2, firsts());
}

void SuffixTree::append(Token token) { push(token); }

// Goes down to the lowest node at or above the place. Returns the edge on which the place is, null
// if it is on a node.
const ChildTable::Edge* SuffixTree::settle(Locus& at, const Token* end) const {
    while (at.len > 0) {
        const ChildTable::Edge* edge = find(at.node, end[-at.len]);
        const int32_t len = edge_len(at.node, edge->child);
        if (at.len < len) return edge;
        at = {edge->child, at.len - len};
    }
    return nullptr;
}

void SuffixTree::push(Token token) {
    if (text_.size() >= INT32_MAX) throw std::length_error("a text of 2^31 tokens");
    make_room(text_);
    text_.push_back(token);
    const int32_t size = static_cast<int32_t>(text_.size());
    int32_t unlinked = 0;  // the node of the suffix before, whose link is the one of this suffix
    while (num_leaves_ < size) {
        // `active_` is text[num_leaves_, size - 1): it gets a leaf unless `token` follows it
        // already.
        const ChildTable::Edge* edge = settle(active_, end() - 1);
        int32_t node = active_.node;
        if (edge == nullptr) {
            if (unlinked != 0) nodes_[unlinked].link = node;
            unlinked = 0;
            if (find(node, token) != nullptr) break;
        } else {
            const int32_t at = start(edge->child) + nodes_[node].depth + active_.len;
            if (text_[at] == token) break;
            node = split(edge, active_.len);
            if (unlinked != 0) nodes_[unlinked].link = node;
            unlinked = node;
        }
        add_leaf(node, token);
        if (num_leaves_ == size) return;
        shorten(active_);
    }
    ++active_.len;
}

// A node `len` tokens down the edge; the child hangs below it. Has one child until the leaf comes
// for which it is made; that also makes it its parent's top, if the child was.
int32_t SuffixTree::split(const ChildTable::Edge* edge, int32_t len) {
    const auto [parent, child] = *edge;
    const auto node = static_cast<int32_t>(nodes_.size());
    make_room(nodes_);
    nodes_.push_back({.depth = nodes_[parent].depth + len,
                      .parent = parent,
                      .link = 0,
                      .count = count(child),
                      .latest = start(child),
                      .top = kNone});
    edges_.replace(edge, node);
    if (!is_leaf(child)) nodes_[child].parent = node;
    const Token below = first(node, child);
    if (below >= 0) nodes_[node].top = child;
    edges_.insert(node, below, child, firsts());
    return node;
}

// The leaf of the next suffix, and what its ancestors know of it.
void SuffixTree::add_leaf(int32_t node, Token token) {
    const int32_t suffix = num_leaves_++;
    edges_.insert(node, token, ~suffix, firsts());
    int32_t child = ~suffix;
    for (int32_t i = 0; i < kMaxWalk && node != 0; ++i) {
        Node& above = nodes_[node];
        ++above.count;
        above.latest = suffix;
        const bool may_lead = text_[suffix + above.depth] >= 0;
        if (may_lead && (above.top == kNone || count(child) >= count(above.top))) above.top = child;
        child = node;
        node = above.parent;
    }
}

void SuffixTree::shorten(Locus& at) const {
    if (at.node == 0) {
        --at.len;
    } else {
        at.node = nodes_[at.node].link;
    }
}

void SuffixTree::step(Locus& at, const Token* end) const {
    const Token token = end[-1];
    while (true) {
        const ChildTable::Edge* edge = settle(at, end - 1);
        if (edge == nullptr) {
            if (find(at.node, token) != nullptr) break;
            if (at.node == 0) return;
        } else if (text_[start(edge->child) + nodes_[at.node].depth + at.len] == token) {
            break;
        }
        shorten(at);
    }
    ++at.len;
}

bool SuffixTree::continues(Locus at, const Token* end) const {
    const ChildTable::Edge* edge = settle(at, end);
    if (edge == nullptr) return at.node != 0 && nodes_[at.node].top != kNone;
    return text_[start(edge->child) + nodes_[at.node].depth + at.len] >= 0;
}

size_t SuffixTree::behind(Locus at, const Token* end) const {
    const ChildTable::Edge* edge = settle(at, end);
    const int32_t first = edge == nullptr ? nodes_[at.node].latest : start(edge->child);
    return static_cast<size_t>(first) + nodes_[at.node].depth + at.len;
}

// The child to follow; kNone if there is none.
int32_t SuffixTree::favourite(int32_t node) const {
    const Node& above = nodes_[node];
    const Token latest = text_[above.latest + above.depth];
    if (above.top == kNone || latest < 0) return above.top;
    const int32_t child = find(node, latest)->child;
    return count(child) + 1 >= count(above.top) ? child : above.top;
}

void SuffixTree::follow(Locus at, const Token* end, size_t max_tokens,
                        std::vector<Token>& ids) const {
    const ChildTable::Edge* edge = settle(at, end);
    int32_t node = at.node, len = at.len;
    int32_t child = edge == nullptr ? kNone : edge->child;
    const size_t from = ids.size(), size = text_.size();
    while (ids.size() - from < max_tokens) {
        if (child != kNone && len == edge_len(node, child)) {
            node = child;
            child = kNone;
        }
        if (child == kNone) {
            child = favourite(node);
            len = 0;
            if (child == kNone) return;
        }
        const size_t next = static_cast<size_t>(start(child)) + nodes_[node].depth + len++;
        const Token token = next < size ? text_[next] : ids[from + next - size];
        if (token < 0) return;
        ids.push_back(token);
    }
}

}  // namespace tokenspeed::drafts

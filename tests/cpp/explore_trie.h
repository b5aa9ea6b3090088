// SPDX-License-Identifier: MIT
// Names each prefix of tokens (under its salt) by one number, exactly: equal numbers, equal
// prefixes. The fake device writes these numbers into its pages, so that content is compared, not
// hashes.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "scheduler/prefix_index.h"

namespace tokenspeed {

using Prefix = int32_t;
inline constexpr Prefix kUnwritten = -1;

class Trie {
  public:
    Prefix root(const std::vector<uint8_t>& salt) {
        const auto [found, fresh] = roots_.emplace(salt, static_cast<Prefix>(nodes_.size()));
        if (fresh) nodes_.push_back({.salt = &found->first});
        return found->second;
    }
    Prefix child(Prefix parent, int32_t token) {
        for (const auto& [id, node] : nodes_[parent].children) {
            if (id == token) return node;
        }
        const auto node = static_cast<Prefix>(nodes_.size());
        nodes_[parent].children.emplace_back(token, node);
        nodes_.push_back({.parent = parent, .token = token, .length = nodes_[parent].length + 1});
        return node;
    }
    int32_t length(Prefix prefix) const { return nodes_[prefix].length; }

    // The key under which the index must hold the page that ends with this prefix.
    Hash128 key(Prefix prefix, const PrefixIndex& index, int page_size) {
        if (nodes_[prefix].length == 0) return index.root(*nodes_[prefix].salt);
        if (nodes_[prefix].keyed) return nodes_[prefix].key;
        std::vector<int32_t> tokens(page_size);
        Prefix at = prefix;
        for (int i = page_size - 1; i >= 0; --i, at = nodes_[at].parent)
            tokens[i] = nodes_[at].token;
        nodes_[prefix].key = index.link(key(at, index, page_size), tokens);
        nodes_[prefix].keyed = true;
        return nodes_[prefix].key;
    }

  private:
    struct Node {
        Prefix parent = kUnwritten;
        int32_t token = 0;
        int32_t length = 0;
        const std::vector<uint8_t>* salt = nullptr;
        bool keyed = false;
        Hash128 key = {};
        std::vector<std::pair<int32_t, Prefix>> children = {};
    };
    std::vector<Node> nodes_;
    std::map<std::vector<uint8_t>, Prefix> roots_;
};

}  // namespace tokenspeed

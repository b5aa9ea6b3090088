// SPDX-License-Identifier: MIT
// What the drafters of csrc/drafts must answer, found by looking at everything. Knows no trees.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "drafts/draft.h"
#include "drafts/history.h"
#include "drafts/suffix_drafter.h"
#include "scheduler/check.h"

namespace tokenspeed::drafts {

using Tokens = std::vector<Token>;

// Where `text` has text[from, to) as it has the last `len` tokens of `query`.
inline std::vector<size_t> places(const Tokens& text, size_t num_starts, const Tokens& query,
                                  size_t len) {
    std::vector<size_t> found;
    for (size_t j = 0; j < num_starts && j + len <= text.size(); ++j) {
        if (std::equal(query.end() - len, query.end(), text.begin() + j)) found.push_back(j);
    }
    return found;
}

// The token that most of `starts` have at `len`; the latest counts twice, and before its equals.
inline Token favourite(const Tokens& text, const std::vector<size_t>& starts, size_t len) {
    std::map<Token, std::pair<size_t, size_t>> seen;  // how often, latest
    for (const size_t j : starts) {
        const Token token = text[j + len];
        if (token >= 0) seen[token] = {seen[token].first + 1, j};
    }
    if (seen.empty()) return -1;
    const Token top =
        std::ranges::max_element(seen, {}, [](const auto& item) { return item.second; })->first;
    const Token latest = text[starts.back() + len];
    return latest >= 0 && seen[latest].first + 1 >= seen[top].first ? latest : top;
}

inline Draft continuation(Tokens text, std::vector<size_t> starts, size_t len, size_t max_tokens) {
    Draft draft{.ids = {}, .match_len = static_cast<int32_t>(len)};
    for (; draft.ids.size() < max_tokens; ++len) {
        const Token token = favourite(text, starts, len);
        if (token < 0) break;
        std::erase_if(starts, [&](size_t j) { return text[j + len] != token; });
        draft.ids.push_back(token);
        text.push_back(token);
    }
    return draft;
}

// The draft for `query` from `text`, by the longest of its last `most` tokens, down to `least`,
// that goes on. `starts` are those of the text that count.
inline Draft best_draft(const Tokens& text, size_t num_starts, const Tokens& query, size_t most,
                        size_t least, size_t max_tokens) {
    for (size_t len = most; len >= least; --len) {
        const auto starts = places(text, num_starts, query, len);
        if (!starts.empty() && favourite(text, starts, len) >= 0) {
            return continuation(text, starts, len, max_tokens);
        }
    }
    return {};
}

// The longest suffix of `text` that it also has earlier.
inline size_t longest_match(const Tokens& text) {
    size_t len = 0;
    while (len + 1 < text.size() && places(text, text.size() - len - 1, text, len + 1).size() > 0) {
        ++len;
    }
    return len;
}

inline Draft own_draft(const Tokens& text, size_t max_tokens) {
    const size_t len = longest_match(text);
    if (len == 0) return {};
    const size_t least = len > kContext ? len - kContext : 1;
    return best_draft(text, text.size() - len, text, len, least, max_tokens);
}

class DrafterModel {
  public:
    explicit DrafterModel(const SuffixOptions& options) : options_(options) {}

    void add(uint64_t id, const Tokens& prompt, const std::string& salt) {
        auto best = kept_.end();
        size_t most = 0;
        for (auto it = kept_.begin(); it != kept_.end(); ++it) {
            const size_t common = shared(it->sequence, prompt);
            if (it->salt != salt || 2 * common < it->text.size() || common <= most) continue;
            most = common;
            best = it;
        }
        Request request{.text = {}, .sequence = prompt, .output = {}, .salt = salt};
        if (best != kept_.end()) {
            request.text = best->text;
            size_t from = most;
            if (most < best->sequence.size()) {
                request.text.push_back(--separator_);
                from = most - std::min<size_t>(most, kContext);
                ++num_diverged;
            } else {
                ++num_continued;
            }
            kept_.erase(best);
            request.text.insert(request.text.end(), prompt.begin() + from, prompt.end());
        } else {
            request.text = prompt;
        }
        live.emplace(id, request);
    }

    void extend(uint64_t id, const Tokens& ids) {
        Request& request = live.at(id);
        for (Tokens* tokens : {&request.text, &request.sequence, &request.output}) {
            tokens->insert(tokens->end(), ids.begin(), ids.end());
        }
    }

    Draft propose(uint64_t id, size_t max_tokens) {
        const Request& request = live.at(id);
        Draft best = own_draft(request.text, max_tokens);
        const size_t most = std::min<size_t>(request.sequence.size(), kContext);
        const auto found = std::ranges::find(stores_, request.salt, &Store::salt);
        if (found != stores_.end()) {
            for (const Tokens* text : {&found->young, &found->old}) {
                Draft draft =
                    best_draft(*text, text->size(), request.sequence, most, 1, max_tokens);
                if (draft.match_len > best.match_len) best = draft, ++num_stored;
            }
            stores_.splice(stores_.begin(), stores_, found);
        }
        return best.match_len < options_.min_match ? Draft{} : best;
    }

    void remove(uint64_t id) {
        Request request = live.at(id);
        live.erase(id);
        if (!request.output.empty()) store(request.salt, request.output);
        kept_.push_front(request);
        while (num_kept_tokens() > options_.max_kept_tokens) kept_.pop_back(), ++num_evicted;
    }

    void forget_ended() {
        kept_.clear();
        stores_.clear();
    }

    size_t num_kept_tokens() const {
        size_t sum = 0;
        for (const Request& request : kept_) sum += request.text.size();
        return sum;
    }
    size_t num_stored_tokens() const {
        size_t sum = 0;
        for (const Store& store : stores_) sum += store.young.size() + store.old.size();
        return sum;
    }

    struct Request {
        Tokens text, sequence, output;
        std::string salt;
    };
    std::map<uint64_t, Request> live;
    int64_t num_continued = 0, num_diverged = 0, num_stored = 0, num_evicted = 0, num_dropped = 0;

  private:
    struct Store {
        std::string salt;
        Tokens young, old;
    };

    static size_t shared(const Tokens& a, const Tokens& b) {
        return std::ranges::mismatch(a, b).in1 - a.begin();
    }

    void store(const std::string& salt, Tokens output) {
        const size_t half = options_.shared_store_tokens / 2;
        if (half < 2) return;
        if (output.size() >= half) output.erase(output.begin(), output.end() - (half - 1));
        output.push_back(--separator_);
        auto it = std::ranges::find(stores_, salt, &Store::salt);
        if (it == stores_.end())
            it = stores_.insert(it, Store{.salt = salt, .young = {}, .old = {}});
        Store store = std::move(*it);
        stores_.erase(it);
        if (store.young.size() + output.size() > half) {
            store.old = std::move(store.young);
            store.young.clear();
        }
        store.young.insert(store.young.end(), output.begin(), output.end());
        stores_.push_front(store);
        while (num_stored_tokens() > 2 * half) stores_.pop_back(), ++num_dropped;
    }

    SuffixOptions options_;
    std::list<Request> kept_;
    std::list<Store> stores_;
    Token separator_ = 0;
};

}  // namespace tokenspeed::drafts

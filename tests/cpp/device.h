// SPDX-License-Identifier: MIT
// The reference side of the random walk: what each request must say (`Truth`), and a device of maps
// that remembers in each page which token, at which position, under which salt, which step wrote.
// Knows the layouts of plan.h and nothing of the scheduler's insides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <span>
#include <vector>

#include "scheduler/check.h"
#include "scheduler/plan.h"

namespace tokenspeed {

using Tokens = std::vector<int32_t>;

// The model: the next token is a hash of the whole prefix.
inline int32_t next_token(const Tokens& tokens, size_t count) {
    uint32_t hash = 17;
    for (size_t i = 0; i < count; ++i) hash = hash * 31 + static_cast<uint32_t>(tokens[i]) + 7;
    return static_cast<int32_t>((hash ^ hash >> 11) % 13);
}

// A request as its client sees it.
struct Truth {
    Tokens sequence;  // the prompt and all that the model can say after it
    int32_t num_prompt = 0;
    int32_t known = 0;   // tokens the client has
    int32_t length = 0;  // tokens when it ends by itself
    int32_t finish = 0;
    uint8_t salt = 0;
    bool read_cache = true;
    bool prompt_logprobs = false;
    bool over = false;  // ended or aborted: no update may follow
};

struct PlanView {
    explicit PlanView(std::span<const int32_t> words) : words_(words.begin(), words.end()) {
        TS_CHECK(word(kPlanHeaderMagic) == kPlanMagic &&
                 word(kPlanHeaderVersion) == kLayoutVersion);
        TS_CHECK(word(kPlanHeaderTotalWords) == std::ssize(words_));
        rows = kPlanHeaderWords;
        tokens = rows + num_rows() * kRowWords;
        deltas = tokens + word(kPlanHeaderNumTokens);
        binds = deltas + num_deltas() * kDeltaWords;
        TS_CHECK(binds + num_binds() * kBindWords == std::ssize(words_));
    }
    int word(int at) const { return words_[at]; }
    int num_rows() const { return word(kPlanHeaderNumRows); }
    int num_deltas() const { return word(kPlanHeaderNumDeltas); }
    int num_binds() const { return word(kPlanHeaderNumBinds); }
    const int32_t* row(int i) const { return &words_[rows + i * kRowWords]; }
    const int32_t* delta(int i) const { return &words_[deltas + i * kDeltaWords]; }
    const int32_t* bind(int i) const { return &words_[binds + i * kBindWords]; }
    int token(int at) const { return words_[tokens + at]; }
    uint64_t request(int i) const {
        return static_cast<uint32_t>(bind(i)[1]) | uint64_t{static_cast<uint32_t>(bind(i)[2])}
                                                       << 32;
    }
    int rows, tokens, deltas, binds;

  private:
    std::vector<int32_t> words_;
};

class Device {
  public:
    // `overlaps`: a request may be in the step after the one that samples its next token.
    Device(int page_size, bool overlaps) : page_size_(page_size), overlaps_(overlaps) {}

    struct Coverage {
        int64_t hit_tokens = 0, rows = 0, from_device = 0, failed = 0, chunks_in_flight = 0;
        int64_t drafts = 0, accepted = 0, proposing = 0;
    };

    // Checks a plan when it is made and takes it in flight. `truths`: by request id; aborted
    // requests stay there as long as a step in flight may name them.
    void launch(std::span<const int32_t> words, const std::map<uint64_t, Truth*>& truths);
    // Runs the oldest plan that has not run yet, if there is one.
    void run_one();
    // The result of the oldest plan in flight; rows for which `fails(i)` is true fail.
    template <class F>
    Tokens result(F fails);
    void committed();
    int num_in_flight() const { return static_cast<int>(in_flight_.size()); }
    uint64_t row_request(int i) const { return in_flight_.front().owners[i]; }
    const Coverage& coverage() const { return coverage_; }

  private:
    struct Cell {
        int32_t token = -1, position = -1;
        uint8_t salt = 0;
        uint64_t step = 0;     // that wrote it, counted from 1; 0: poison
        bool tainted = false;  // a failed row stood on it
    };
    struct Slot {
        uint64_t request = 0;
        Truth truth;  // as it was when bound; the sequence never changes
        std::map<int, int> table;
        int32_t next = -1;  // position after the last planned row; -1: bound, no row yet
    };
    struct Flight {
        PlanView plan;
        uint64_t step;
        bool ran = false;
        std::vector<uint64_t> owners;            // [rows] request ids
        std::vector<Slot> slots;                 // [rows] as they were at launch
        std::set<int> pages;                     // read or written
        std::vector<std::pair<int, int>> fresh;  // row, index of pages first written here
        std::vector<Tokens> sampled;             // [rows] ids that the row accepts
    };

    void take_binds(const PlanView& plan, const std::map<uint64_t, Truth*>& truths);
    void take_row(Flight& flight, int i, std::set<int>& targets);
    void check_draft(const int32_t* row);
    void check_disjoint(const Slot& slot, const int32_t* row);
    void check_hit(const Slot& slot, int start, uint64_t num_committed) const;
    void run_row(Flight& flight, int i);
    void taint(int i);
    void check_cell(const Cell& cell, const Slot& slot, int position) const;

    int page_size_;
    bool overlaps_;
    uint64_t steps_ = 0;
    std::map<int, Slot> slots_;
    std::map<int, std::vector<Cell>> pages_;
    std::map<int, int32_t> last_sampled_;
    std::deque<Flight> in_flight_;
    Coverage coverage_;
};

inline void Device::take_binds(const PlanView& plan, const std::map<uint64_t, Truth*>& truths) {
    for (int i = 0; i < plan.num_binds(); ++i) {
        const int32_t* bind = plan.bind(i);
        const uint64_t id = plan.request(i);
        const auto found = truths.find(id);
        TS_CHECK(found != truths.end() && !found->second->over);
        TS_CHECK(bind[3] == found->second->known);
        slots_[bind[0]] = Slot{id, *found->second, {}, -1};
    }
    std::set<std::pair<int, int>> entries;
    for (int i = 0; i < plan.num_deltas(); ++i) {
        const int32_t* delta = plan.delta(i);
        TS_CHECK(delta[0] == 0 && slots_.contains(delta[1]));
        TS_CHECK(entries.emplace(delta[1], delta[2]).second);
        slots_[delta[1]].table[delta[2]] = delta[3];
    }
}

inline void Device::launch(std::span<const int32_t> words,
                           const std::map<uint64_t, Truth*>& truths) {
    Flight flight{PlanView(words), ++steps_, false, {}, {}, {}, {}, {}};
    const PlanView& plan = flight.plan;
    TS_CHECK(plan.word(kPlanHeaderStepLow) == int32_t(steps_ - 1) && plan.num_rows() > 0);
    take_binds(plan, truths);
    std::set<int> targets, slots;
    for (int i = 0; i < plan.num_rows(); ++i) {
        const int slot = plan.row(i)[kRowSlot];
        TS_CHECK(slots.insert(slot).second && slots_.contains(slot));
        const auto truth = truths.find(slots_[slot].request);
        TS_CHECK(truth != truths.end() && !truth->second->over);
        take_row(flight, i, targets);
    }
    in_flight_.push_back(std::move(flight));
}

inline void Device::take_row(Flight& flight, int i, std::set<int>& targets) {
    const int32_t* row = flight.plan.row(i);
    Slot& slot = slots_[row[kRowSlot]];
    const int start = row[kRowStart], end = start + row[kRowNumTokens];
    ++coverage_.rows;
    check_draft(row);
    const int num_draft = row[kRowNumDraft];
    TS_CHECK(slot.next == -1 || slot.next == start);
    check_disjoint(slot, row);
    TS_CHECK(end < slot.truth.length || slot.truth.finish == 1);  // a stop is found out later
    TS_CHECK(end <= std::ssize(slot.truth.sequence));
    if (slot.next == -1) {
        check_hit(slot, start, steps_ - 1 - in_flight_.size());
        coverage_.hit_tokens += start;
    }
    const bool logits = slot.truth.prompt_logprobs && slot.truth.known == slot.truth.num_prompt &&
                        start < slot.truth.num_prompt;
    TS_CHECK(((row[kRowFlags] & kRowPromptLogprobs) != 0) == logits);
    TS_CHECK(!logits || slot.next != -1 || start == 0);
    const bool samples = (row[kRowFlags] & kRowSample) != 0;
    TS_CHECK(samples == (end - num_draft >= slot.truth.known));
    for (int at = 0; at < row[kRowNumTokens] - num_draft; ++at) {
        const int token = flight.plan.token(row[kRowTokenOffset] + at);
        coverage_.from_device += token == kTokenFromDevice;
        TS_CHECK(token == slot.truth.sequence[start + at] ||
                 (token == kTokenFromDevice && overlaps_ && start + at >= slot.truth.known));
    }
    for (int index = start / page_size_; index * page_size_ < end; ++index) {
        TS_CHECK(slot.table.contains(index));
        const int page = slot.table[index];
        TS_CHECK(targets.insert(page).second);  // I13: one writer
        for (const Flight& other : in_flight_) {
            const auto own = std::ranges::find(other.owners, slot.request);
            TS_CHECK(own != other.owners.end() || !other.pages.contains(page));  // I2
        }
        if (index * page_size_ >= start) flight.fresh.emplace_back(i, index);
    }
    for (int index = 0; index * page_size_ < end; ++index) flight.pages.insert(slot.table[index]);
    slot.next = end;
    flight.owners.push_back(slot.request);
    flight.slots.push_back(slot);
    flight.sampled.emplace_back();
}

// Who verifies drafts goes on from one token that is known; prompts verify nothing.
inline void Device::check_draft(const int32_t* row) {
    const int num_draft = row[kRowNumDraft];
    TS_CHECK(row[kRowNumTokens] > 0 && num_draft >= 0 && row[kRowNumPropose] >= 0);
    const bool samples = (row[kRowFlags] & kRowSample) != 0;
    const bool prefill = (row[kRowFlags] & kRowPrefill) != 0;
    TS_CHECK(num_draft == 0 || (samples && !prefill && row[kRowNumTokens] == 1 + num_draft));
    TS_CHECK(row[kRowNumPropose] == 0 || samples);
    coverage_.drafts += num_draft;
    coverage_.proposing += row[kRowNumPropose] > 0;
}

// M1: steps in flight share no request, but for the chunks of a prompt and, with overlap, rows that
// do not speculate.
inline void Device::check_disjoint(const Slot& slot, const int32_t* row) {
    const auto speculates = [](const int32_t* r) {
        return r[kRowNumDraft] > 0 || r[kRowNumPropose] > 0;
    };
    for (const Flight& other : in_flight_) {
        const auto own = std::ranges::find(other.owners, slot.request);
        if (own == other.owners.end()) continue;
        const int32_t* earlier = other.plan.row(static_cast<int>(own - other.owners.begin()));
        const bool plain = overlaps_ && !speculates(earlier) && !speculates(row);
        const bool chunks =
            (earlier[kRowFlags] & kRowSample) == 0 && (row[kRowFlags] & kRowPrefill) != 0;
        TS_CHECK(plain || chunks);
        coverage_.chunks_in_flight += !overlaps_;
    }
}

// I3, I4: what a hit stands on was written, by a step that had committed when the plan was made.
inline void Device::check_hit(const Slot& slot, int start, uint64_t num_committed) const {
    TS_CHECK(start == 0 || slot.truth.read_cache);
    TS_CHECK(start % page_size_ == 0 && start < slot.truth.known);
    for (int position = 0; position < start; ++position) {
        const auto& page = pages_.at(slot.table.at(position / page_size_));
        const Cell& cell = page[position % page_size_];
        check_cell(cell, slot, position);
        TS_CHECK(cell.step <= num_committed && !cell.tainted);
    }
}

inline void Device::check_cell(const Cell& cell, const Slot& slot, int position) const {
    TS_CHECK(cell.step != 0);
    TS_CHECK(cell.position == position && cell.token == slot.truth.sequence[position]);
    TS_CHECK(cell.salt == slot.truth.salt);
}

inline void Device::run_one() {
    for (Flight& flight : in_flight_) {
        if (flight.ran) continue;
        for (const auto& [row, index] : flight.fresh) {
            pages_[flight.slots[row].table[index]].assign(page_size_, Cell{});
        }
        for (int i = 0; i < flight.plan.num_rows(); ++i) run_row(flight, i);
        flight.ran = true;
        return;
    }
}

inline void Device::run_row(Flight& flight, int i) {
    const int32_t* row = flight.plan.row(i);
    const Slot& slot = flight.slots[i];
    const int start = row[kRowStart], end = start + row[kRowNumTokens];
    const int firm_end = end - row[kRowNumDraft];
    for (int position = start; position < end; ++position) {
        int32_t token = flight.plan.token(row[kRowTokenOffset] + position - start);
        if (token == kTokenFromDevice) token = last_sampled_.at(row[kRowSlot]);
        Cell& cell = pages_.at(slot.table.at(position / page_size_))[position % page_size_];
        cell = Cell{token, position, slot.truth.salt, flight.step};
    }
    Tokens seen;
    for (int position = 0; position < firm_end; ++position) {
        const Cell& cell = pages_.at(slot.table.at(position / page_size_))[position % page_size_];
        check_cell(cell, slot, position);
        seen.push_back(cell.token);
    }
    if ((row[kRowFlags] & kRowSample) == 0) return;
    Tokens& ids = flight.sampled[i];
    for (int at = firm_end;; ++at) {
        ids.push_back(next_token(seen, seen.size()));
        seen.push_back(ids.back());
        const int token = at < end ? flight.plan.token(row[kRowTokenOffset] + at - start) : -1;
        if (token != ids.back()) break;
    }
    // A place behind the first one whose numbers are not finite: the row stops before it.
    if (ids.size() > 1 && (flight.step + i) % 7 == 0) ids.pop_back();
    coverage_.accepted += std::ssize(ids) - 1;
    last_sampled_[row[kRowSlot]] = ids.back();
}

// The next row of who verified drafts begins behind those that it accepted.
inline void Device::committed() {
    const Flight& flight = in_flight_.front();
    for (int i = 0; i < flight.plan.num_rows(); ++i) {
        const int32_t* row = flight.plan.row(i);
        Slot& slot = slots_.at(row[kRowSlot]);
        if (row[kRowNumDraft] == 0 || slot.request != flight.owners[i]) continue;
        slot.next = row[kRowStart] + static_cast<int>(flight.sampled[i].size());
    }
    in_flight_.pop_front();
}

// Nobody may hit what a failed row of the oldest step read or wrote.
inline void Device::taint(int i) {
    const Flight& flight = in_flight_.front();
    const int32_t* row = flight.plan.row(i);
    for (int position = 0; position < row[kRowStart] + row[kRowNumTokens]; ++position) {
        auto& page = pages_.at(flight.slots[i].table.at(position / page_size_));
        page[position % page_size_].tainted = true;
    }
}

template <class F>
Tokens Device::result(F fails) {
    while (!in_flight_.front().ran) run_one();
    const Flight& flight = in_flight_.front();
    Tokens rows, ids;
    for (int i = 0; i < flight.plan.num_rows(); ++i) {
        const bool failed = fails(i);
        const auto count = failed ? 0 : static_cast<int32_t>(flight.sampled[i].size());
        coverage_.failed += failed;
        if (failed) taint(i);
        rows.insert(rows.end(),
                    {flight.plan.row(i)[kRowSlot], failed ? kRowFailed : kRowOk, count});
        ids.insert(ids.end(), flight.sampled[i].begin(), flight.sampled[i].begin() + count);
    }
    const auto total = static_cast<int32_t>(kResultHeaderWords + rows.size() + ids.size());
    Tokens words = {kResultMagic,
                    kLayoutVersion,
                    total,
                    flight.plan.word(kPlanHeaderStepLow),
                    flight.plan.word(kPlanHeaderStepHigh),
                    flight.plan.num_rows(),
                    static_cast<int32_t>(ids.size()),
                    0};
    words.insert(words.end(), rows.begin(), rows.end());
    words.insert(words.end(), ids.begin(), ids.end());
    return words;
}

}  // namespace tokenspeed

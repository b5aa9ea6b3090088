// SPDX-License-Identifier: MIT
// Moves: what happens to the clients and to the device, and what the scheduler must answer.
#include "explore_world.h"

#include <algorithm>

namespace tokenspeed {

namespace {
constexpr HashKey kKey{0x0706050403020100, 0x0f0e0d0c0b0a0908};
constexpr int32_t kGarbage = 8;  // what a failed row samples

Move::Outcome outcome_of(uint32_t outcomes, size_t row) {
    return static_cast<Move::Outcome>((outcomes >> (4 * row)) & 15);
}
}  // namespace

World::World(const Scenario& scenario, Trie& trie, Coverage& coverage)
    : scenario_(scenario),
      trie_(trie),
      coverage_(coverage),
      page_size_(scenario.options.page_size),
      scheduler_(std::make_unique<Scheduler>(scenario.options, kKey)),
      clients_(scenario.specs.size()),
      tables_(scenario.options.max_num_seqs),
      owner_(scenario.options.max_num_seqs),
      cells_(static_cast<size_t>(scenario.options.num_pages) * page_size_) {}

std::vector<Move> World::moves() const {
    std::vector<Move> all;
    for (uint32_t i = 0; i < clients_.size(); ++i) {
        if (!live(i) && clients_[i] && !scenario_.again) continue;
        all.push_back({live(i) ? Move::kAbort : Move::kSubmit, i});
    }
    if (scenario_.again && scheduler_->stats().num_cached_pages > 0)
        all.push_back({Move::kFlush, 0});
    if (scenario_.time && scheduler_->stats().num_retained_pages > 0)
        all.push_back({Move::kTime, 0});
    const auto speculating = std::min<size_t>(clients_.size(), scenario_.num_speculating);
    for (uint32_t client = 0; client < speculating; ++client) {
        for (uint32_t guess = 0; live(client) && guess < scenario_.guesses.size(); ++guess) {
            all.push_back({Move::kSpeculate, guess << 8 | client});
        }
    }
    if (num_in_flight() < scheduler_->max_in_flight()) all.push_back({Move::kPlan, 0});
    if (flights_.empty()) return all;
    std::vector<uint32_t> outcomes = {0};
    const std::vector<Row>& rows = flights_.front().rows;
    for (size_t row = 0; row < rows.size(); ++row) {
        const size_t count = outcomes.size();
        for (uint32_t more : outcomes_of(rows[row])) {
            for (size_t i = 0; i < count; ++i) outcomes.push_back(outcomes[i] | more << (4 * row));
        }
    }
    for (uint32_t detail : outcomes) all.push_back({Move::kCommit, detail});
    return all;
}

void World::apply(Move move, bool check) {
    check_ = check;
    switch (move.kind) {
        case Move::kSubmit:
            return submit(static_cast<int>(move.detail));
        case Move::kAbort:
            return abort(static_cast<int>(move.detail));
        case Move::kPlan:
            return plan();
        case Move::kCommit:
            return commit(move.detail);
        case Move::kFlush:
            return demand(scheduler_->flush_cache() > 0, "nothing was flushed");
        case Move::kTime:
            return scheduler_->advance(++now_);
        case Move::kSpeculate:
            return speculate(static_cast<int>(move.detail & 255),
                             scenario_.guesses[move.detail >> 8]);
    }
}

NewRequest World::request(int client) const {
    static constexpr int32_t kStops[] = {kStopId};
    const Spec& spec = scenario_.specs[client];
    return {.id = id_of(client),
            .prompt = spec.prompt,
            .max_tokens = spec.max_tokens,
            .min_tokens = spec.min_tokens,
            .stop_ids = kStops,
            .salt = spec.salt,
            .read_cache = spec.read_cache,
            .prompt_logprobs = spec.prompt_logprobs,
            .user = spec.user,
            .retention = spec.retention,
            .terms = {}};
}

void World::submit(int client) {
    coverage_.id_reuse += check_ && clients_[client] && in_flight(*clients_[client]);
    scheduler_->submit(request(client));
    const std::vector<int32_t>& prompt = scenario_.specs[client].prompt;
    clients_[client] =
        std::make_shared<Life>(Life{.client = client, .tokens = prompt, .device_tokens = prompt});
}

void World::abort(int client) {
    demand(scheduler_->abort(id_of(client)), "I7: a live request cannot be aborted");
    demand(!scheduler_->abort(id_of(client)), "I7: an aborted request is aborted again");
    clients_[client]->live = false;
    unbind_if_over(*clients_[client]);
}

void World::unbind(Life& life) {
    owner_[life.slot] = nullptr;
    life.slot = -1;
}

void World::unbind_if_over(Life& life) {
    if (!life.live && life.slot >= 0 && !in_flight(life)) unbind(life);
}

void World::commit(uint32_t outcomes) {
    const Flight flight = std::move(flights_.front());
    const std::vector<int32_t> words = result(flight, outcomes);
    flights_.pop_front();
    Updates expected;
    for (size_t i = 0; i < flight.rows.size(); ++i) {
        const Row& row = flight.rows[i];
        const Move::Outcome outcome = outcome_of(outcomes, i);
        const std::vector<int32_t> ids = sampled(row, outcome);
        coverage_.late_rows += check_ && !row.life->live;
        coverage_.failed_rows += check_ && outcome == Move::kFail;
        coverage_.late_drafts += check_ && !row.life->live && !row.draft.empty();
        coverage_.accepted += check_ && ids.size() > 1;
        coverage_.rejected += check_ && outcome != Move::kFail && ids.size() <= row.draft.size();
        run(row, outcome, ids);
        settle(row, outcome, ids, expected);
    }
    const Updates& updates = scheduler_->commit(words);
    demand(updates.request_ids == expected.request_ids, "updates name the wrong requests");
    demand(updates.finish == expected.finish, "wrong finish reason");
    demand(updates.num_ids == expected.num_ids && updates.ids == expected.ids, "wrong ids");
    demand(updates.num_cached == expected.num_cached, "wrong count of cached tokens");
    demand(updates.receipt_ids == expected.receipt_ids, "not one receipt with the first report");
    demand(updates.receipt_kept_us == expected.receipt_kept_us, "a wrong promise of retention");
    for (const Row& row : flight.rows) unbind_if_over(*row.life);
}

// Writes what the row computes into its pages.
void World::run(const Row& row, Move::Outcome outcome, const std::vector<int32_t>& ids) {
    Life& life = *row.life;
    life.poisoned |= outcome == Move::kFail;
    Prefix prefix = root_of(life);
    for (int position = 0; position < row.end(); ++position) {
        const int behind = position - row.firm_end();
        prefix = trie_.child(prefix, behind < 0 ? life.device_tokens[position] : row.draft[behind]);
        const PageId page = row.pages[position / page_size_];
        Cell& at = cells_[page * page_size_ + position % page_size_];
        if (position >= row.start) {
            at = {prefix, life.poisoned, position >= std::ssize(spec_of(life).prompt)};
        } else {
            demand(at.prefix == prefix, "K2: what a step reads was overwritten before it ran");
        }
    }
    life.device_tokens.insert(life.device_tokens.end(), ids.begin(), ids.end());
    if (row.sample && ids.empty()) life.device_tokens.push_back(kGarbage);
    if (!row.draft.empty()) life.next = row.start + static_cast<int>(ids.size());
}

// What the client must be told of its row.
void World::settle(const Row& row, Move::Outcome outcome, std::vector<int32_t> ids,
                   Updates& expected) {
    Life& life = *row.life;
    if (!life.live) return;
    const bool failed = outcome == Move::kFail;
    if (!failed && !row.sample) return;
    const Spec& spec = spec_of(life);
    const size_t given = ids.size();
    const Finish finish = failed ? Finish::kError : take(life, ids);
    coverage_.stop_inside += check_ && ids.size() < given;
    if (finish != Finish::kNone) life.live = false;
    expected.request_ids.push_back(id_of(life.client));
    expected.finish.push_back(static_cast<int32_t>(finish));
    expected.num_ids.push_back(static_cast<int32_t>(ids.size()));
    expected.num_cached.push_back(std::min(life.resumed_at, static_cast<int>(spec.prompt.size())));
    expected.ids.insert(expected.ids.end(), ids.begin(), ids.end());
    if (std::exchange(life.heard, true)) return;
    const SchedulerOptions& options = scenario_.options;
    const int budget = options.num_pages * options.retention_permille / 1000;
    const bool keeps = static_cast<int>(spec.prompt.size()) / page_size_ <= budget;
    const TimeUs wish = spec.retention.pinned ? kMaxRetentionUs : spec.retention.for_us;
    expected.receipt_ids.push_back(id_of(life.client));
    expected.receipt_kept_us.push_back(keeps ? wish : 0);
}

std::vector<int32_t> World::result(const Flight& flight, uint32_t outcomes) const {
    std::vector<int32_t> words(kResultHeaderWords, 0), ids;
    for (size_t i = 0; i < flight.rows.size(); ++i) {
        const Row& row = flight.rows[i];
        const Move::Outcome outcome = outcome_of(outcomes, i);
        const bool failed = outcome == Move::kFail;
        const std::vector<int32_t> gives = sampled(row, outcome);
        for (int32_t word : {row.slot, int32_t{failed ? kRowFailed : kRowOk},
                             static_cast<int32_t>(gives.size())}) {
            words.push_back(word);
        }
        ids.insert(ids.end(), gives.begin(), gives.end());
    }
    words.insert(words.end(), ids.begin(), ids.end());
    words[kResultHeaderMagic] = kResultMagic;
    words[kResultHeaderVersion] = kLayoutVersion;
    words[kResultHeaderTotalWords] = static_cast<int32_t>(words.size());
    words[kResultHeaderStepLow] = flight.header[0];
    words[kResultHeaderStepHigh] = flight.header[1];
    words[kResultHeaderNumRows] = static_cast<int32_t>(flight.rows.size());
    words[kResultHeaderNumIds] = static_cast<int32_t>(ids.size());
    return words;
}

bool World::any_live() const {
    return std::ranges::any_of(clients_, [](const LifeOf& life) { return life && life->live; });
}

bool World::in_flight(const Life& life) const {
    for (const Flight& flight : flights_) {
        for (const Row& row : flight.rows) {
            if (row.life.get() == &life) return true;
        }
    }
    return false;
}

int World::limit(const Life& life) const {
    const Spec& spec = spec_of(life);
    return std::min(static_cast<int>(spec.prompt.size()) + spec.max_tokens,
                    scenario_.options.max_model_len);
}

int World::pages_for(int num_tokens) const { return (num_tokens + page_size_ - 1) / page_size_; }

uint64_t World::hash() const {
    Digest digest;
    const bool shares =
        std::ranges::any_of(scenario_.specs, [](const Spec& spec) { return spec.user != 0; });
    digest.add(Inspector(*scheduler_).canonical_hash(shares));
    for (const Flight& flight : flights_) {
        for (const Row& row : flight.rows) digest.add(row.life->poisoned);
    }
    for (const LifeOf& life : clients_) digest.add(!scenario_.again && life != nullptr);
    return digest.value();
}

std::string World::describe(Move move) const {
    static constexpr const char* kKinds[] = {"submit ", "abort ", "plan",      "commit",
                                             "flush",   "time",   "draft for "};
    std::string text = kKinds[move.kind];
    if (move.kind == Move::kSubmit || move.kind == Move::kAbort) {
        text += static_cast<char>('A' + move.detail);
    }
    if (move.kind == Move::kSpeculate) {
        const Guess& guess = scenario_.guesses[move.detail >> 8];
        text += static_cast<char>('A' + (move.detail & 255));
        text += " of " + std::to_string(guess.num_draft) + (guess.stops ? " with a stop" : "") +
                ", proposes " + std::to_string(guess.num_propose);
    }
    if (move.kind != Move::kCommit) return text;
    static constexpr const char* kOutcomes[] = {"ok",   "FAILED",  "short",
                                                "stop", "stop +1", "stop +2"};
    for (size_t i = 0; i < flights_.front().rows.size(); ++i) {
        const Row& row = flights_.front().rows[i];
        text += std::string(" ") + static_cast<char>('A' + row.life->client) + "[" +
                std::to_string(row.start) + "," + std::to_string(row.end()) +
                ")=" + kOutcomes[outcome_of(move.detail, i)];
    }
    return text;
}

}  // namespace tokenspeed

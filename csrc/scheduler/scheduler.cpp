// SPDX-License-Identifier: MIT
// Requests in, results in: submit, abort, commit. Plans nothing.
#include "scheduler/scheduler.h"

#include <algorithm>
#include <stdexcept>

namespace tokenspeed {

namespace {

constexpr int kReservedOutputs = 4096;  // tokens a request's vector has room for from the start

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

SchedulerOptions checked(const SchedulerOptions& o) {
    require(o.num_pages >= 1, "num_pages must be at least 1");
    require(o.page_size >= 1, "page_size must be at least 1");
    require(o.max_num_seqs >= 1, "max_num_seqs must be at least 1");
    require(o.max_model_len >= 2, "max_model_len must be at least 2");
    require(o.max_num_partial_prefills >= 1, "max_num_partial_prefills must be at least 1");
    require(o.overlap_depth == 0 || o.overlap_depth == 1, "overlap_depth must be 0 or 1");
    require(o.num_micro_steps >= 1, "num_micro_steps must be at least 1");
    require(o.num_micro_steps == 1 || o.overlap_depth == 0,
            "num_micro_steps above 1 excludes overlap_depth 1");
    require(o.max_retractions >= 0, "max_retractions must not be negative");
    require(o.max_num_batched_tokens >= o.max_num_seqs,
            "max_num_batched_tokens must be at least max_num_seqs");
    require(o.retention_permille >= 0 && o.retention_permille <= 1000,
            "retention_share must be between 0 and 1");
    require(int64_t{o.num_pages} * o.page_size <= INT32_MAX,
            "num_pages * page_size must stay below 2**31");
    return o;
}

}  // namespace

void Updates::clear() {
    request_ids.clear();
    receipt_ids.clear();
    receipt_kept_us.clear();
    for (auto* column : {&finish, &num_ids, &num_cached, &ids, &receipt_miss}) column->clear();
}

Scheduler::Scheduler(const SchedulerOptions& options, HashKey key)
    : options_(checked(options)),
      pool_(options.num_pages),
      index_(pool_, options.page_size, key,
             std::make_unique<RetainingLru>(options.num_pages, max_retained())),
      slots_(options.max_num_seqs),
      log_(options) {}

// Steps in flight die first: their leases are what keeps requests from going.
Scheduler::~Scheduler() {
    step_.rows.clear();
    in_flight_.clear();
}

void Scheduler::submit(const NewRequest& request) {
    const auto num_prompt = static_cast<int64_t>(request.prompt.size());
    require(num_prompt > 0, "the prompt is empty");
    require(num_prompt < options_.max_model_len, "the prompt leaves no room in max_model_len");
    require(request.max_tokens >= 1, "max_tokens must be at least 1");
    require(request.min_tokens >= 0 && request.min_tokens <= request.max_tokens,
            "min_tokens must be between 0 and max_tokens");
    require(std::ranges::all_of(request.prompt, [](int32_t id) { return id >= 0; }),
            "the prompt holds a negative id");
    require(request.retention.for_us >= 0, "retention_s must not be negative");
    const int64_t limit =
        std::min<int64_t>(num_prompt + request.max_tokens, options_.max_model_len);
    require(pages_for(static_cast<int32_t>(limit - 1)) <= options_.num_pages,
            "the request can never fit: it needs more pages than there are");
    const auto taken = live_.find(request.id);
    const bool free =
        taken == live_.end() || apply(taken->second->state, Submit{}) != Verdict::kRejected;
    require(free, "the request id is already in use");

    check_terms(request.terms);
    auto fresh = std::make_unique<Request>();
    fresh->id = request.id;
    fresh->arrival = next_arrival_++;
    fresh->num_prompt = static_cast<int32_t>(num_prompt);
    fresh->limit = static_cast<int32_t>(limit);
    fresh->min_tokens = request.min_tokens;
    fresh->read_cache = request.read_cache;
    fresh->prompt_logprobs = request.prompt_logprobs;
    fresh->stop_ids.assign(request.stop_ids.begin(), request.stop_ids.end());
    std::ranges::sort(fresh->stop_ids);
    fresh->tokens.reserve(std::min<int64_t>(limit, num_prompt + kReservedOutputs));
    fresh->tokens.assign(request.prompt.begin(), request.prompt.end());
    fresh->root = index_.root(request.salt);
    fresh->retention = {std::min(request.retention.for_us, kMaxRetentionUs),
                        request.retention.pinned};
    fresh->user = &waiting_.join(request.user);
    log_.submit(request);
    queue(*fresh, request.terms);
    waiting_.push(*fresh->user, fresh->place(), fresh.get(), /*returns=*/false);
    live_.emplace(request.id, std::move(fresh));
}

bool Scheduler::abort(uint64_t request_id) {
    const auto found = live_.find(request_id);
    if (found == live_.end()) return false;
    log_.abort(request_id);
    Holdings* held = holdings(found->second->state);
    if (mutant(Mutant::kK5PublishOnAbort) && held != nullptr) {
        held->settled = held->scheduled;
        publish(*found->second, *held, Committed(held->settled).settled(0));
    }
    retain_pages(*found->second);
    if (held != nullptr) unsend(held->slot.id());
    const bool moved = apply(found->second->state, Abort{}) == Verdict::kMoved;
    TS_CHECK(moved);
    leave(*found->second);
    return true;
}

bool Scheduler::speculate(uint64_t request_id, std::span<const int32_t> draft,
                          int32_t num_propose) {
    require(num_propose >= 0, "num_propose must not be negative");
    require(std::ranges::all_of(draft, [](int32_t id) { return id >= 0; }),
            "the draft holds a negative id");
    const auto found = live_.find(request_id);
    if (found == live_.end()) return false;
    log_.speculate(request_id, draft, num_propose);
    found->second->draft.assign(draft.begin(), draft.end());
    found->second->num_propose = num_propose;
    return true;
}

// REQUIRES: the request has just become Draining or Finished.
void Scheduler::leave(Request& request) {
    if (!mutant(Mutant::kK12RoomUnnoticed)) ++room_version_;
    waiting_.erase(*request.user, request.place());
    if (pacer_ != nullptr) pacer_->left(request.id);
    waiting_.leave(*std::exchange(request.user, nullptr));
    std::erase(running_, &request);
    auto node = live_.extract(request.id);
    if (std::holds_alternative<Draining>(request.state))
        draining_.push_back(std::move(node.mapped()));
}

const Updates& Scheduler::commit(std::span<const int32_t> result) {
    check_result(result);
    log_.commit(result);
    updates_.clear();
    Step step = std::move(in_flight_.front());
    in_flight_.pop_front();
    if (pacer_ != nullptr) pacer_->committed();
    const int32_t* word = result.data() + kResultHeaderWords;
    const int32_t* id = word + step.rows.size() * kResultRowWords;
    for (Row& row : step.rows) {
        const int32_t count = word[kResultRowNumAccepted];
        row.lease.release();
        settle(row, word[kResultRowStatus], {id, static_cast<size_t>(count)});
        id += count;
        word += kResultRowWords;
    }
    step.rows.clear();
    spare_steps_.push_back(std::move(step));
    check_idle();
    return updates_;
}

// With no request left, nothing may be out.
void Scheduler::check_idle() const {
    if (has_work()) return;
    TS_CHECK(pool_.num_available() == pool_.num_pages());
    TS_CHECK(slots_.num_free() == slots_.num_slots());
    TS_CHECK(ledger_.soft == 0 && ledger_.firm == 0 && in_flight_.empty());
}

// Looks at every word before anything changes.
void Scheduler::check_result(std::span<const int32_t> result) const {
    require(!in_flight_.empty(), "commit: no step is in flight");
    const Step& step = in_flight_.front();
    require(result.size() >= kResultHeaderWords, "commit: the result has no header");
    require(result[kResultHeaderMagic] == kResultMagic, "commit: not a step result");
    require(result[kResultHeaderVersion] == kLayoutVersion, "commit: wrong layout version");
    const auto low = static_cast<uint32_t>(result[kResultHeaderStepLow]);
    const auto high = static_cast<uint32_t>(result[kResultHeaderStepHigh]);
    const uint64_t number = uint64_t{high} << 32 | low;
    const bool later = number > step.number && number < next_step_;
    require(number == step.number || (later && mutant(Mutant::kM1CommitOutOfOrder)),
            "commit: not the oldest step in flight");
    const int64_t num_rows = result[kResultHeaderNumRows];
    const int64_t num_ids = result[kResultHeaderNumIds];
    require(num_rows == std::ssize(step.rows), "commit: wrong number of rows");
    require(num_ids >= 0, "commit: wrong number of ids");
    const int64_t words = kResultHeaderWords + num_rows * kResultRowWords + num_ids;
    require(words == std::ssize(result) && words == result[kResultHeaderTotalWords],
            "commit: wrong length");
    auto word = result.begin() + kResultHeaderWords;
    auto id = word + num_rows * kResultRowWords;
    for (const Row& row : step.rows) {
        const int32_t status = word[kResultRowStatus];
        const int32_t count = word[kResultRowNumAccepted];
        require(word[kResultRowSlot] == row.slot, "commit: rows are not in the plan's order");
        require(status == kRowOk || status == kRowFailed, "commit: unknown row status");
        require(count >= 0 && count <= result.end() - id, "commit: wrong number of ids in a row");
        check_ids(row, status, {id, static_cast<size_t>(count)});
        id += count;
        word += kResultRowWords;
    }
    require(id == result.end(), "commit: ids left over");
}

// All but the last of a row's ids must be the drafts, or its pages do not hold what they should.
void Scheduler::check_ids(const Row& row, int32_t status, std::span<const int32_t> ids) const {
    const auto count = std::ssize(ids);
    if (status == kRowFailed) return require(count <= 1, "commit: wrong number of ids in a row");
    const bool fits = row.samples() ? count >= 1 && count <= 1 + row.num_draft() : count == 0;
    require(fits, "commit: wrong number of ids in a row");
    require(std::ranges::all_of(ids, [](int32_t id) { return id >= 0; }), "commit: a negative id");
    const bool accepted = ids.empty() || std::equal(ids.begin(), ids.end() - 1, row.draft.begin());
    require(accepted, "commit: an accepted id is not the draft's");
}

// Takes in one row. The step's lease on its slot is already back.
void Scheduler::settle(Row& row, int32_t status, std::span<const int32_t> ids) {
    Request& request = *row.request;
    Holdings& held = *holdings(request.state);
    const bool verified = row.samples() && status == kRowOk;
    const int32_t num_rejected =
        verified ? row.num_draft() + 1 - static_cast<int32_t>(ids.size()) : 0;
    const Settled settled = Committed(row.end()).settled(
        mutant(Mutant::kK3CountsRejected) ? std::max(0, num_rejected - 1) : num_rejected);
    held.settled = settled.tokens();
    if (!mutant(Mutant::kK3KeepsScheduled)) held.scheduled -= num_rejected;
    if (row.speculates()) held.alone = false;
    if (mutant(Mutant::kK3CountsPlanned)) held.settled = held.scheduled;
    if (mutant(Mutant::kK3CountsSampled)) held.settled += row.samples();
    const bool over = std::holds_alternative<Draining>(request.state);
    Finish finish = Finish::kNone;
    if (status == kRowFailed) {
        // What the failed row read or wrote may be what is wrong: nobody shall find it again.
        for (int i = 0; i < held.pages.num_sealed(); ++i) index_.forget(held.pages.sealed(i));
        request.tainted = !mutant(Mutant::kK5PublishAfterFailure);
        if (!over) return end_running(request, Finish::kError, {});
    } else {
        if (!over) finish = take_ids(request, ids);
        publish(request, held,
                mutant(Mutant::kK5PublishRejected) ? Committed(row.end()).settled(0) : settled);
    }
    if (over) {
        if (held.slot.leased()) return;
        retain_pages(request);
        const bool moved = apply(request.state, Drained{}) == Verdict::kMoved;
        TS_CHECK(moved);
        if (mutant(Mutant::kK11DrainedStays)) return;
        std::erase_if(draining_, [&](const auto& other) { return other.get() == &request; });
        ++room_version_;
        return;
    }
    if (ids.empty()) return;
    if (pacer_ != nullptr) pacer_->emitted(request.id, static_cast<int32_t>(ids.size()));
    waiting_.charge(*request.user, std::ssize(ids));
    if (finish != Finish::kNone) return end_running(request, finish, ids);
    report(request, Finish::kNone, ids);
}

// D2: the ids one by one, up to the one that ends the request; `ids` becomes those. A draft that
// waits goes on from the last of them, or is dropped.
Finish Scheduler::take_ids(Request& request, std::span<const int32_t>& ids) {
    for (size_t i = 0; i < ids.size(); ++i) {
        request.tokens.push_back(ids[i]);
        const bool goes_on = !request.draft.empty() && request.draft.front() == ids[i];
        request.draft.erase(request.draft.begin(),
                            goes_on ? request.draft.begin() + 1 : request.draft.end());
        const bool last = i + 1 == ids.size();
        const bool stops = (last || !mutant(Mutant::kS2StopIgnored)) &&
                           request.num_outputs() >= request.min_tokens &&
                           std::ranges::binary_search(request.stop_ids, ids[i]);
        if (!stops && request.known() < request.limit) continue;
        ids = ids.first(i + 1);
        return stops ? Finish::kStop : Finish::kLength;
    }
    return Finish::kNone;
}

void Scheduler::end_running(Request& request, Finish finish, std::span<const int32_t> ids) {
    report(request, finish, ids);
    retain_pages(request);
    const bool moved = apply(request.state, End{}) == Verdict::kMoved;
    TS_CHECK(moved);
    leave(request);
}

void Scheduler::report(Request& request, Finish finish, std::span<const int32_t> ids) {
    updates_.request_ids.push_back(request.id);
    updates_.finish.push_back(static_cast<int32_t>(finish));
    updates_.num_ids.push_back(static_cast<int32_t>(ids.size()));
    updates_.num_cached.push_back(request.num_cached);
    updates_.ids.insert(updates_.ids.end(), ids.begin(), ids.end());
    if (std::exchange(request.reported, !mutant(Mutant::kR5ReceiptTwice))) return;
    updates_.receipt_ids.push_back(request.id);
    updates_.receipt_miss.push_back(static_cast<int32_t>(request.miss));
    updates_.receipt_kept_us.push_back(kept_us(request));
}

// Seals the pages that committed steps filled, and makes them findable.
void Scheduler::publish(Request& request, Holdings& held, const Settled& settled) {
    const int first = held.pages.num_sealed();
    const Settled proof = settled.at_most(request.known());
    if (proof.tokens() / options_.page_size == first) return;
    held.pages.seal_full(pool_, proof, options_.page_size);
    if (!options_.enable_prefix_caching || request.tainted) return;
    for (int page = first; page < held.pages.num_sealed(); ++page) {
        const Hash128 hash = chain_at(request, page);
        const Hash128 parent = page == 0 ? request.root : request.chain[page - 1];
        const bool generated = (page + 1) * options_.page_size > request.num_prompt;
        index_.publish(held.pages.sealed(page), parent, hash, page_tokens(request.tokens, page),
                       generated);
    }
}

// The hash of tokens [0, (page + 1) * page_size); each link is computed once.
Hash128 Scheduler::chain_at(Request& request, int page) {
    for (int next = static_cast<int>(request.chain.size()); next <= page; ++next) {
        const Hash128 parent = next == 0 ? request.root : request.chain.back();
        request.chain.push_back(index_.link(parent, page_tokens(request.tokens, next)));
    }
    return request.chain[page];
}

Stats Scheduler::stats() const {
    Stats stats = counters_;
    stats.num_running = std::ssize(running_);
    stats.num_waiting = waiting_.size();
    stats.num_pages = pool_.num_pages();
    stats.num_free_pages = pool_.num_free();
    stats.num_cached_pages = index_.num_kept();
    stats.num_retained_pages = index_.policy().num_retained();
    stats.num_pinned_pages = index_.policy().num_pinned();
    return stats;
}

int Scheduler::flush_cache() {
    log_.flush_cache();
    return index_.clear();
}

const Request* Scheduler::find(uint64_t request_id) const {
    const auto found = live_.find(request_id);
    return found == live_.end() ? nullptr : found->second.get();
}

}  // namespace tokenspeed

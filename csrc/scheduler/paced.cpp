// SPDX-License-Identifier: MIT
// Prompts where a pacer says how much of them a step may have. Knows no times.
//
// Prompts are computed one after the other, not in turns: who is first by priority, what it has to
// compute and how long it waited ends first. max_num_partial_prefills is not asked: a prompt is
// admitted when little is left of those before it, so a short one passes a long one at once.
#include <algorithm>
#include <stdexcept>

#include "scheduler/scheduler.h"

namespace tokenspeed {

void Scheduler::pace(Pacer* pacer) {
    const char* refusal = nullptr;
    if (next_arrival_ > 0) refusal = "pace: there have been requests already";
    if (options_.num_micro_steps > 1) refusal = "pace: num_micro_steps must be 1";
    if (options_.record_events != 0) refusal = "pace: a log of events tells no step times";
    if (refusal != nullptr) throw std::invalid_argument(refusal);
    pacer_ = pacer;
    pacer_->advance(now_);
}

void Scheduler::check_terms(const Terms& terms) const {
    const auto require = [](bool condition, const char* message) {
        if (!condition) throw std::invalid_argument(message);
    };
    if (terms.tps_floor.has_value()) {
        const double floor = *terms.tps_floor;
        require(floor >= 0 && floor <= kMostFloor, "tps_floor must be between 0 and 10000");
        require(floor == 0 || pacer_ != nullptr, "tps_floor needs a pacer");
    }
    if (terms.max_wait_us.has_value()) {
        require(*terms.max_wait_us >= 0, "max_wait_s must not be negative");
        require(pacer_ != nullptr, "max_wait_s needs a pacer");
    }
}

// REQUIRES: the request waits in no queue yet.
void Scheduler::queue(Request& request, const Terms& terms) {
    request.priority = terms.priority;
    if (pacer_ == nullptr) return;
    match(request);
    const auto num_cached = static_cast<int32_t>(hits_.size()) * options_.page_size;
    request.key = pacer_->queued(request.id, terms, request.known(), request.known() - num_cached);
}

// ---- Who gives pages back -----------------------------------------------------------------------

// Tokens that would be computed again if the request were retracted: all but those of the first
// pages that others read too. Its own are what somebody lacks.
int32_t Scheduler::num_lost(const Request& request) const {
    if (!reads_cache(request)) return request.known();
    const PageList& pages = holdings(request.state)->pages;
    int num_shared = 0;
    while (num_shared < pages.num_sealed() && pool_.num_users(pages.id(num_shared)) > 1) {
        ++num_shared;
    }
    return request.known() - std::min(num_shared * options_.page_size, request.known());
}

// If a page may be lacking: puts who loses least last in `turns_`, to be planned last and retracted
// first. So whoever is retracted has not been planned for this step.
void Scheduler::order_by_loss() {
    if (pool_.num_available() - ledger_.firm >= std::ssize(turns_)) return;
    for (Request* request : turns_) {
        request->loss = pacer_->loss(request->id, request->known(), num_lost(*request));
    }
    std::ranges::sort(turns_, [](const Request* a, const Request* b) {
        return a->loss == b->loss ? a->arrival < b->arrival : a->loss > b->loss;
    });
}

Request* Scheduler::cheapest_to_retract() const {
    for (auto it = turns_.rbegin(); it != turns_.rend(); ++it) {
        const bool runs = holdings((*it)->state) != nullptr;
        if (runs && (*it)->retractions < options_.max_retractions) return *it;
    }
    return nullptr;
}

// ---- What prompts have --------------------------------------------------------------------------

// Of the rows that are planned already: those that decode.
StepLoad Scheduler::load() const {
    StepLoad load;
    for (const Row& row : step_.rows) {
        pacer_->decodes(row.request->id);
        load.num_decodes += row.samples();
        load.num_drafts += row.num_draft();
        load.num_proposed += row.num_propose;
        load.most_proposed = std::max(load.most_proposed, row.num_propose);
        load.num_context += row.start + row.num_tokens;
    }
    load.must_run = step_.rows.empty() && in_flight_.empty();
    return load;
}

// Whether a step's worth of prompts that come before this one's is still to be computed: then it
// would only hold a slot and pages.
bool Scheduler::prompts_before(const Request& request) const {
    if (pacer_ == nullptr) return false;
    int64_t left = 0;
    for (const Request* other : turns_) {
        const int32_t rest = other->known() - holdings(other->state)->scheduled;
        left += other->place() < request.place() ? rest : 0;
    }
    return left >= options_.max_num_batched_tokens;
}

// Sets each prefilling request's `chunk`, admitting first whoever may run.
void Scheduler::pace_prefills() {
    std::vector<Request*>& prefilling = turns_;
    prefilling.clear();
    const auto add = [&](Request* request) {
        if (!std::holds_alternative<Prefilling>(request->state)) return;
        request->chunk = 0;
        if (request != left_out_) prefilling.push_back(request);
    };
    for (Request* request : running_) add(request);
    while (budget_ > 0 && left_out_ == nullptr) {
        Request* request = admit_next();
        if (request == nullptr) break;
        add(request);
    }
    std::ranges::sort(prefilling, {}, &Request::place);
    pacer_->load(load());
    int32_t left = budget_;
    for (Request* request : prefilling) {
        const int32_t start = std::get<Prefilling>(request->state).held.scheduled;
        const int32_t most = std::min(request->known() - start, left);
        if (most > 0) request->chunk = pacer_->chunk(request->id, start, most);
        left -= request->chunk;
    }
}

}  // namespace tokenspeed

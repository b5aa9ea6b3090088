// SPDX-License-Identifier: MIT
// next_plan: who runs in the next step, and on which pages. Reads no results.
#include <algorithm>
#include <stdexcept>

#include "scheduler/scheduler.h"

namespace tokenspeed {

std::span<const int32_t> Scheduler::next_plan() {
    if (num_in_flight() >= max_in_flight()) {
        throw std::invalid_argument(
            "next_plan: overlap_depth + num_micro_steps steps are not committed");
    }
    log_.plan();
    if (!spare_steps_.empty()) {
        step_ = std::move(spare_steps_.back());
        spare_steps_.pop_back();
    }
    left_out_ = nullptr;
    budget_ = micro_share(options_.max_num_batched_tokens);
    plan_decodes();
    plan_drafts();
    plan_prefills();
    // S1 makes room for whole known sequences, and a decoding request without a page retracts until
    // it has one: somebody can always run, unless a step in flight has to bring pages back first.
    // Who was admitted although a pacer gave it nothing is bound by the next plan.
    if (step_.rows.empty()) {
        TS_CHECK(!in_flight_.empty() || live_.empty());
        return {};
    }
    return emit();
}

// The request's state if a row of one token may be planned for it now. Who speculates waits until
// its last token is known, for that is what a draft goes on from.
Decoding* Scheduler::decodable(Request& request) const {
    auto* decoding = std::get_if<Decoding>(&request.state);
    if (decoding == nullptr || &request == left_out_) return nullptr;
    const int32_t next = decoding->held.scheduled;
    if (next + 1 >= request.limit) return nullptr;  // ends with the step in flight
    if (decoding->held.alone && !mutant(Mutant::kM1SpeculatesTwice)) return nullptr;
    const bool from_device =
        (options_.overlap_depth > 0 && !request.speculates()) || mutant(Mutant::kM1PlannedTwice);
    return next < request.known() || from_device ? decoding : nullptr;
}

// Lists in `turns_` who may decode, in order; returns how many of them the step takes (M2). Those
// in flight count for the share: they come back.
int32_t Scheduler::take_turns() {
    turns_.assign(running_.begin(), running_.end());
    if (pacer_ != nullptr) order_by_loss();
    if (options_.num_micro_steps == 1) return static_cast<int32_t>(turns_.size());
    std::erase_if(turns_, [](const Request* request) {
        const auto* decoding = std::get_if<Decoding>(&request->state);
        return decoding == nullptr ||  // all drafts may be rejected
               std::min(decoding->held.scheduled, request->known()) + 1 >= request->limit;
    });
    const auto num_decoding = std::ssize(turns_);
    const int32_t share =
        mutant(Mutant::kM2Uneven) ? static_cast<int32_t>(num_decoding) : micro_share(num_decoding);
    std::erase_if(turns_, [&](Request* request) { return decodable(*request) == nullptr; });
    if (std::ssize(turns_) > share) std::ranges::sort(turns_, {}, &Request::served);
    return share;
}

void Scheduler::plan_decodes() {
    int32_t share = take_turns();
    for (size_t i = 0; i < turns_.size() && budget_ > 0 && share > 0;) {
        Request& request = *turns_[i];
        Decoding* decoding = decodable(request);
        if (decoding == nullptr) {
            ++i;
            continue;
        }
        if (take_pages(decoding->held, 1)) {
            plan_row(request, decoding->held, 1);
            --share;
            ++i;
            continue;
        }
        if (reclaim_spare()) continue;
        // `request` itself can be retracted, so there is a victim, and it has its turn no earlier.
        Request* victim = retractable();
        TS_CHECK(victim != nullptr);
        if (holdings(victim->state)->slot.leased() && !mutant(Mutant::kK2RetractInFlight)) {
            left_out_ = victim;
            ++i;
        } else {
            retract(*victim);
        }
    }
}

bool Scheduler::prompts_wait() const {
    return waiting_.size() > 0 || std::ranges::any_of(running_, [](const Request* request) {
               return std::holds_alternative<Prefilling>(request->state);
           });
}

// D1: lengthens the rows of decoding requests by their drafts, as far as there is room.
void Scheduler::plan_drafts() {
    int32_t left = prompts_wait() && !mutant(Mutant::kS1PromptsStarve) ? budget_ / 2 : budget_;
    for (Row& row : step_.rows) {
        Request& request = *row.request;
        row.draft = std::exchange(request.draft, {});
        if (row.draft.empty()) continue;
        Holdings& held = *holdings(request.state);
        const int32_t most = mutant(Mutant::kS1BeyondLimit) ? left : request.limit - row.end() - 1;
        const int32_t count = std::max(0, std::min({row.num_draft(), left, most}));
        row.draft.resize(pages_for_draft(held, count));
        row.num_tokens += row.num_draft();
        held.scheduled += row.num_draft();
        held.alone |= !row.draft.empty();
        budget_ -= row.num_draft();
        left -= row.num_draft();
    }
}

// Gives each prefilling request its chunk, in order of arrival, admitting as long as there is room.
void Scheduler::plan_prefills() {
    int32_t left = 0;
    if (pacer_ == nullptr) {
        left = share_budget();
    } else {
        pace_prefills();
    }
    for (Request* request : running_) {
        auto* prefilling = std::get_if<Prefilling>(&request->state);
        if (prefilling == nullptr || request->chunk == 0) continue;
        Holdings& held = prefilling->held;
        const int32_t rest = request->known() - held.scheduled - request->chunk;
        const int32_t more = std::min(rest, left);  // what nobody else wanted
        left -= more;
        int32_t count = request->chunk + more;
        if (!take_pages(held, count)) {
            count = std::min(count, held.pages.size() * options_.page_size - held.scheduled);
        }
        if (count > 0) plan_row(*request, held, count);
        if (held.scheduled == request->known()) apply(request->state, Prefilled{});
    }
}

// Sets each prefilling request's `chunk` to at most an equal share of the budget, so that several
// prompts advance at once; returns what is left.
int32_t Scheduler::share_budget() {
    int32_t left = budget_;
    int32_t partial = 0;
    const int32_t share = std::max(1, left / options_.max_num_partial_prefills);
    auto give = [&](Request& request) {
        auto* prefilling = std::get_if<Prefilling>(&request.state);
        if (prefilling == nullptr) return;
        const int32_t rest = request.known() - prefilling->held.scheduled;
        request.chunk = &request == left_out_ ? 0 : std::min({rest, share, left});
        left -= request.chunk;
        partial += request.chunk < rest;
    };
    for (Request* request : running_) give(*request);
    while (left > 0 && partial < options_.max_num_partial_prefills && left_out_ == nullptr) {
        Request* request = admit_next();
        if (request == nullptr) break;
        give(*request);
    }
    return left;
}

void Scheduler::add_delta(const Holdings& held, int index) {
    for (int32_t word : {0, held.slot.id(), index, held.pages.id(index)}) {
        sections_.deltas.push_back(word);
    }
}

// The slot's request goes: what no plan has brought yet must not reach the slot's next one.
void Scheduler::unsend(int32_t slot) {
    const auto erase = [](std::vector<int32_t>& words, int size, const auto& goes) {
        size_t end = 0;
        for (size_t at = 0; at < words.size(); at += size) {
            if (goes(&words[at])) continue;
            std::copy_n(words.begin() + at, size, words.begin() + end);
            end += size;
        }
        words.resize(end);
    };
    erase(sections_.deltas, kDeltaWords, [&](const int32_t* delta) { return delta[1] == slot; });
    erase(sections_.binds, kBindWords, [&](const int32_t* bind) { return bind[0] == slot; });
}

// Takes pages for the next `num_tokens` positions; false if there are not enough (then it took
// what there is).
bool Scheduler::take_pages(Holdings& held, int32_t num_tokens) {
    const int wanted = pages_for(held.scheduled + num_tokens);
    while (held.pages.size() < wanted) {
        const bool promised = held.promise.firm() && held.promise.num_left() > 0;
        if (!promised && pool_.num_available() <= ledger_.firm) return false;
        take_page(held);
    }
    return true;
}

void Scheduler::take_page(Holdings& held) {
    held.promise.take();
    held.pages.append(pool_.open(pool_.take()));
    add_delta(held, held.pages.size() - 1);
}

// Takes pages for drafts behind what is scheduled; returns how many drafts find room. What is left
// suffices for every promise and, while the drafts are in flight, for the others' next tokens.
int32_t Scheduler::pages_for_draft(Holdings& held, int32_t num_draft) {
    const int wanted = pages_for(held.scheduled + num_draft);
    const int64_t others =
        mutant(Mutant::kS1TakesPromised) ? 0 : ledger_.soft + ledger_.firm + std::ssize(running_);
    if (mutant(Mutant::kS1DraftRetracts) && held.pages.size() < wanted &&
        pool_.num_available() <= others && !holdings(running_.back()->state)->slot.leased()) {
        retract(*running_.back());
    }
    while (held.pages.size() < wanted &&
           (held.promise.num_left() > 0 || pool_.num_available() > others)) {
        take_page(held);
    }
    return std::min(num_draft, held.pages.size() * options_.page_size - held.scheduled);
}

// Takes back the pages that only rejected drafts of one request wanted; false if nobody has any. No
// step in flight reads them: they lie behind all that is scheduled. Who has a firm promise keeps
// them, for nobody else could have had them.
bool Scheduler::reclaim_spare() {
    for (auto it = running_.rbegin(); it != running_.rend(); ++it) {
        Holdings& held = *holdings((*it)->state);
        const int32_t used = mutant(Mutant::kS1ReclaimsInFlight)
                                 ? std::min(held.scheduled, (*it)->known())
                                 : held.scheduled;
        const int needed = pages_for(used);
        if (held.promise.firm() || held.pages.size() <= needed) continue;
        held.pages.drop_behind(needed);
        ++room_version_;
        return true;
    }
    return false;
}

void Scheduler::plan_row(Request& request, Holdings& held, int32_t num_tokens) {
    const int32_t start = held.scheduled;
    const int32_t end = start + num_tokens;
    held.pages.targets(start / options_.page_size, pages_for(end));
    const bool prefill = std::holds_alternative<Prefilling>(request.state);
    const bool sample = end >= request.known();
    const int32_t flags = (sample ? kRowSample : 0) | (prefill ? kRowPrefill : 0) |
                          (prefill && request.wants_prompt_logits() ? kRowPromptLogprobs : 0);
    int32_t num_propose = 0;
    if (sample) {
        // More could never be verified: the row gives a token, and the next one samples one too.
        const int32_t most = std::max(0, request.limit - request.known() - 2);
        num_propose = std::min(std::exchange(request.num_propose, 0), most);
        if (prefill) request.draft.clear();
    }
    step_.rows.push_back({&request,
                          held.slot.id(),
                          flags,
                          start,
                          num_tokens,
                          num_propose,
                          {},
                          slots_.lease(held.slot)});
    held.scheduled = end;
    held.alone = num_propose > 0;
    request.served = ++num_rows_;
    budget_ -= num_tokens;
    if (mutant(Mutant::kK2LeaseDropped)) step_.rows.back().lease.release();
    if (mutant(Mutant::kK5PublishAtPlan)) {
        held.settled = end;
        publish(request, held, Committed(end).settled(0));
    }
}

// The latest arrival that may still be retracted; with a pacer, whoever loses least by it.
Request* Scheduler::retractable() const {
    if (pacer_ != nullptr) return cheapest_to_retract();
    for (auto it = running_.rbegin(); it != running_.rend(); ++it) {
        const bool may = (*it)->retractions < options_.max_retractions;
        if (may || mutant(Mutant::kK12NoAgeing)) return *it;
    }
    return nullptr;
}

void Scheduler::retract(Request& request) {
    unsend(holdings(request.state)->slot.id());
    const bool moved = apply(request.state, Retract{}) == Verdict::kMoved;
    TS_CHECK(moved);
    std::erase(running_, &request);
    waiting_.push(*request.user, request.place(), &request, /*returns=*/true);
    if (pacer_ != nullptr) pacer_->retracted(request.id);
    request.draft.clear();
    request.num_propose = 0;
    ++request.retractions;
    ++counters_.num_preemptions;
    ++room_version_;
}

// The sections of rows and of tokens.
void Scheduler::write_rows() {
    int32_t offset = 0;
    for (const Row& row : step_.rows) {
        for (int32_t word : {row.slot, row.flags, row.start, row.num_tokens, row.num_draft(),
                             offset, row.num_propose}) {
            plan_.push_back(word);
        }
        offset += row.num_tokens;
    }
    for (const Row& row : step_.rows) {
        const std::vector<int32_t>& tokens = row.request->tokens;
        if (row.start < row.request->known()) {
            const auto first = tokens.begin() + row.start;
            plan_.insert(plan_.end(), first, first + (row.num_tokens - row.num_draft()));
        } else {
            plan_.push_back(kTokenFromDevice);
        }
        plan_.insert(plan_.end(), row.draft.begin(), row.draft.end());
    }
}

std::span<const int32_t> Scheduler::emit() {
    const Sections& s = sections_;
    plan_.assign(kPlanHeaderWords, 0);
    write_rows();
    const auto num_row_words = std::ssize(step_.rows) * kRowWords;
    const auto num_tokens = std::ssize(plan_) - kPlanHeaderWords - num_row_words;
    plan_.insert(plan_.end(), s.deltas.begin(), s.deltas.end());
    plan_.insert(plan_.end(), s.binds.begin(), s.binds.end());
    step_.number = next_step_++;
    plan_[kPlanHeaderMagic] = kPlanMagic;
    plan_[kPlanHeaderVersion] = kLayoutVersion;
    plan_[kPlanHeaderTotalWords] = static_cast<int32_t>(plan_.size());
    plan_[kPlanHeaderStepLow] = static_cast<int32_t>(step_.number);
    plan_[kPlanHeaderStepHigh] = static_cast<int32_t>(step_.number >> 32);
    plan_[kPlanHeaderNumRows] = static_cast<int32_t>(step_.rows.size());
    plan_[kPlanHeaderNumTokens] = static_cast<int32_t>(num_tokens);
    plan_[kPlanHeaderNumDeltas] = static_cast<int32_t>(s.deltas.size()) / kDeltaWords;
    plan_[kPlanHeaderNumBinds] = static_cast<int32_t>(s.binds.size()) / kBindWords;
    plan_[kPlanHeaderOnlyDecodes] = std::ranges::all_of(step_.rows, &Row::only_decodes);
    sections_.deltas.clear();
    sections_.binds.clear();
    in_flight_.push_back(std::move(step_));
    step_ = Step();
    ++counters_.num_steps;
    if (pacer_ != nullptr) pacer_->planned();
    return plan_;
}

}  // namespace tokenspeed

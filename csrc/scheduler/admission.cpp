// SPDX-License-Identifier: MIT
// Who of the waiting is admitted, and on which cached pages. Plans no rows.
#include <algorithm>

#include "scheduler/scheduler.h"

namespace tokenspeed {

namespace {
// Waiting requests that are held back and passed over, of one user, and users looked at.
constexpr int kMaxPassedOver = 8;
constexpr size_t kMaxUsers = 4;
}  // namespace

// Admits the waiting request that is next (fair_queue.h) if there is room for it. One whose next
// page is just being computed for another request is passed over: it will find that page instead of
// computing it too.
Request* Scheduler::admit_next() {
    looked_at_.clear();
    while (looked_at_.size() < kMaxUsers) {
        FairQueue::User* user = waiting_.next(looked_at_);
        if (user == nullptr) return nullptr;
        looked_at_.push_back(user);
        int passed_over = 0;
        for (auto& [place, request] : user->waiting) {
            if (slots_.num_free() == 0 || request->refused_at == room_version_) return nullptr;
            if (pacer_ != nullptr && !pacer_->admits(request->id)) return nullptr;
            if (held_back(*request) || prompts_before(*request)) {
                if (++passed_over == kMaxPassedOver) break;
                continue;
            }
            if (admit(*request)) return start(*request);
            request->refused_at = room_version_;
            return nullptr;
        }
    }
    return nullptr;
}

// Moves an admitted request from those that wait to those that run.
Request* Scheduler::start(Request& request) {
    waiting_.admitted(*request.user, request.place());
    if (pacer_ != nullptr) {
        pacer_->admitted(request.id, request.known() - holdings(request.state)->scheduled);
    }
    const auto later = [](uint64_t a, const Request* b) { return a < b->arrival; };
    running_.insert(std::upper_bound(running_.begin(), running_.end(), request.arrival, later),
                    &request);
    return &request;
}

bool Scheduler::reads_cache(const Request& request) const {
    return options_.enable_prefix_caching && request.read_cache && !request.wants_prompt_logits();
}

// Finds the cached pages to resume from: the longest boundary whose needed pages are all there. The
// last token is always computed again, because its logits are needed. `chain(k)` hashes page k; it
// is asked in order, and for no page behind the last one needed.
template <class Chain>
void Scheduler::find_pages(std::span<const int32_t> tokens, Chain chain,
                           std::vector<PageId>& found) const {
    found.clear();
    const int last = mutant(Mutant::kK3ResumesAtEnd) ? 0 : 1;
    const int most = (static_cast<int>(tokens.size()) - last) / options_.page_size;
    int run = 0;  // pages [run, k) are all there
    int boundary = 0;
    for (int k = 0; k < most && group_.first_needed(most) >= run; ++k) {
        found.push_back(index_.find(chain(k), page_tokens(tokens, k)));
        if (found.back() == kNoPage) {
            run = k + 1;
        } else if (group_.first_needed(k + 1) >= run) {
            boundary = k + 1;
        }
    }
    found.resize(boundary);
}

void Scheduler::match(Request& request) {
    hits_.clear();
    if (!reads_cache(request)) return;
    find_pages(request.tokens, [&](int page) { return chain_at(request, page); }, hits_);
}

int32_t Scheduler::match_prefix(std::span<const int32_t> tokens,
                                std::span<const uint8_t> salt) const {
    if (!options_.enable_prefix_caching || tokens.empty()) return 0;
    std::vector<PageId> found;
    Hash128 hash = index_.root(salt);
    const auto chain = [&](int page) {
        return hash = index_.link(hash, page_tokens(tokens, page));
    };
    find_pages(tokens, chain, found);
    return static_cast<int32_t>(found.size()) * options_.page_size;
}

// Whether a running request is computing pages that this one could share. Remembers which.
bool Scheduler::held_back(Request& request) {
    if (request.twin_pages > 0) {
        const auto earlier = [](const Request* a, uint64_t b) { return a->arrival < b; };
        const auto at = std::lower_bound(running_.begin(), running_.end(), request.twin, earlier);
        const bool runs = at != running_.end() && (*at)->arrival == request.twin;
        if (runs && holdings((*at)->state)->pages.num_sealed() < request.twin_pages) return true;
        request.twin_pages = 0;
    }
    match(request);
    if (!reads_cache(request)) return false;
    const int next = static_cast<int>(hits_.size());
    for (Request* other : running_) {
        if (holdings(other->state)->pages.num_sealed() > next) continue;
        const int most = std::min(request.known() - 1, other->known()) / options_.page_size;
        int same = next;
        while (same < most && chain_at(*other, same) == chain_at(request, same)) ++same;
        if (same == next) continue;
        request.twin = other->arrival;
        request.twin_pages = same;
        return true;
    }
    return false;
}

// REQUIRES: `hits_` is this request's match. Takes slot, pages and promise, or nothing.
bool Scheduler::admit(Request& request) {
    const bool firm = request.retractions >= options_.max_retractions;
    const int num_hits = static_cast<int>(hits_.size());
    const int fresh = pages_for(firm ? request.limit - 1 : request.known()) - num_hits;
    const auto unused = [&](PageId page) { return pool_.num_users(page) == 0; };
    const int64_t headroom = firm ? 0 : std::ssize(running_);
    const int64_t room = pool_.num_available() - std::ranges::count_if(hits_, unused) -
                         ledger_.soft - ledger_.firm - headroom;
    if (mutant(Mutant::kK11HitsLeak) && room < fresh && num_hits > 0) {
        new SealedPage(pool_.share_kept(hits_[0]));
    }
    if (room < fresh) return false;
    PageList pages;
    pages.reserve(pages_for(request.limit - 1));
    for (PageId page : hits_) pages.adopt(pool_.share_kept(page));
    const int32_t resumed_at = num_hits * options_.page_size;
    Holdings held(Promise(&ledger_, firm, fresh), std::move(pages), slots_.take(), resumed_at);
    bind(request, held);
    const bool moved = apply(request.state, Admit{std::move(held)}) == Verdict::kMoved;
    TS_CHECK(moved);
    if (request.num_cached >= 0) return true;
    request.num_cached = std::min(resumed_at, request.num_prompt);
    request.miss = why_not_more(request);
    waiting_.charge(*request.user, request.num_prompt - request.num_cached);
    counters_.prefix_queries += reads_cache(request) ? request.num_prompt : 0;
    counters_.prefix_hits += request.num_cached;
    return true;
}

// REQUIRES: `hits_` is this request's match.
Miss Scheduler::why_not_more(Request& request) {
    if (!reads_cache(request)) return Miss::kDisabled;
    const int num_hits = static_cast<int>(hits_.size());
    if (num_hits >= (request.num_prompt - 1) / options_.page_size) return Miss::kNone;
    return index_.why(chain_at(request, num_hits), num_hits == 0 ? kNoPage : hits_.back());
}

void Scheduler::bind(const Request& request, const Holdings& held) {
    const int32_t slot = held.slot.id();
    const auto low = static_cast<int32_t>(request.id);
    const auto high = static_cast<int32_t>(request.id >> 32);
    const bool again = request.num_cached >= 0;
    const int32_t known = mutant(Mutant::kK15BindForgets) ? request.num_prompt : request.known();
    for (int32_t word : {slot, low, high, known}) {
        if (!again || !mutant(Mutant::kK15BindDropped)) sections_.binds.push_back(word);
    }
    for (int i = 0; i < held.pages.size() && !mutant(Mutant::kK15TableNotSent); ++i) {
        add_delta(held, i);
    }
}

}  // namespace tokenspeed

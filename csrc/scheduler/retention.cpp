// SPDX-License-Identifier: MIT
// Which cached pages should stay: what requests ask for at their end, and what is asked for by
// hand. Decides no order (eviction.h) and plans nothing.
#include <algorithm>
#include <stdexcept>

#include "scheduler/scheduler.h"

namespace tokenspeed {

void Scheduler::advance(TimeUs now) {
    if (pacer_ != nullptr) pacer_->advance(now);
    if (now <= now_) return;
    now_ = now;
    log_.advance(now);
    index_.advance(now);
}

TimeUs Scheduler::deadline_of(const Retention& retention) const {
    return retention.for_us == 0 ? 0 : now_ + std::min(retention.for_us, kMaxRetentionUs);
}

// REQUIRES: the request still holds its pages. Marks those that are findable, or the entries that
// hold the same, from its last use on: that is now.
void Scheduler::retain_pages(Request& request) {
    const auto [for_us, pinned] = request.retention;
    if ((for_us == 0 && !pinned) || request.tainted) return;
    const Holdings* held = holdings(request.state);
    if (held == nullptr || !options_.enable_prefix_caching) return;
    for (int i = held->pages.num_sealed() - 1; i >= 0; --i) {
        PageId page = held->pages.id(i);
        if (!index_.published(page)) {
            page = index_.find(chain_at(request, i), page_tokens(request.tokens, i));
        }
        if (page != kNoPage) index_.retain(page, deadline_of(request.retention), pinned);
    }
}

// What is promised of the prompt's pages. Nothing if they cannot all be marked.
TimeUs Scheduler::kept_us(const Request& request) const {
    const int num_pages = request.num_prompt / options_.page_size;
    const bool fits = num_pages <= max_retained() || mutant(Mutant::kR4PromiseBeyondBudget);
    if (!options_.enable_prefix_caching || !fits) return 0;
    return request.retention.pinned ? kMaxRetentionUs : request.retention.for_us;
}

// The entries that hold the full pages of these tokens, as far as they go.
std::vector<PageId> Scheduler::cached_run(std::span<const int32_t> tokens,
                                          std::span<const uint8_t> salt) const {
    std::vector<PageId> run;
    const auto most = static_cast<int>(tokens.size()) / options_.page_size;
    Hash128 hash = index_.root(salt);
    for (int k = 0; k < most; ++k) {
        hash = index_.link(hash, page_tokens(tokens, k));
        const PageId page = index_.find(hash, page_tokens(tokens, k));
        if (page == kNoPage) break;
        run.push_back(page);
    }
    return run;
}

int Scheduler::retain(std::span<const int32_t> tokens, std::span<const uint8_t> salt,
                      const Retention& retention) {
    if (retention.for_us < 0) throw std::invalid_argument("retention_s must not be negative");
    log_.retain(tokens, salt, retention);
    const std::vector<PageId> run = cached_run(tokens, salt);
    const auto num_pages = static_cast<int>(run.size());
    const bool takes_back = retention.for_us == 0 && !retention.pinned;
    const int first = takes_back ? index_.own_tail(run) : 0;
    for (int i = num_pages - 1; i >= first; --i) {
        if (takes_back) {
            index_.unretain(run[i]);
        } else {
            index_.retain(run[i], deadline_of(retention), retention.pinned);
        }
    }
    return num_pages - first;
}

int Scheduler::release(std::span<const int32_t> tokens, std::span<const uint8_t> salt) {
    log_.release(tokens, salt);
    const std::vector<PageId> run = cached_run(tokens, salt);
    const int first = index_.own_tail(run);
    auto last = static_cast<int>(run.size());
    const int end = last;
    while (last > first && pool_.num_users(run[last - 1]) == 0) index_.drop(run[--last]);
    return end - last;
}

}  // namespace tokenspeed

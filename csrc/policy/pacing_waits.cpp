// SPDX-License-Identifier: MIT
// How long by prediction a request waits, who has waited too long, and what who looks on is told.
// Changes nothing.
#include <algorithm>

#include "policy/pacing.h"

namespace tokenspeed::policy {

double Pacing::predicted_wait_s(uint64_t id) const {
    const auto found = streams_.find(id);
    if (found == streams_.end() || found->second.runs) return 0;
    const Stream& stream = found->second;
    int64_t num_before = 0, tokens_before = 0;
    for (const auto& [other, tokens] : waiting_) {
        if (other >= turn(stream)) break;
        ++num_before;
        tokens_before += tokens;
    }
    for (const auto& [other, tokens] : prefilling_) {
        if (other < turn(stream)) tokens_before += tokens;
    }
    const double prompts_s = prompt_tokens_ > 0 ? prompt_s_ / prompt_tokens_ : 0;
    return std::max(stream_wait_s(stream, num_before),
                    static_cast<double>(tokens_before) * prompts_s);
}

// Until so many streams have ended that this one and those before it may run.
double Pacing::stream_wait_s(const Stream& stream, int64_t num_before) const {
    const int64_t num_running = std::ssize(running_);
    const int64_t all = num_running + num_before + 1;
    const int64_t before_context =
        waiting_context_ / static_cast<int64_t>(waiting_.size()) * num_before;
    const auto context = static_cast<double>(running_context_ + before_context + stream.context);
    const double own = meetable(stream) ? times_per_s(stream) : 0;
    const double most = std::max(own, most_times_per_s());
    const auto suffice = [&](int64_t num_ended) {
        const int64_t rows = all - num_ended;
        const double share = static_cast<double>(rows) / static_cast<double>(all);
        return rows <= 1 || (rows <= options_.max_num_seqs &&
                             holds(rows, static_cast<int64_t>(context * share), most));
    };
    if (suffice(0)) return 0;
    if (mean_life_s_ == 0) return kUnknownWaitS;
    int64_t low = 0, high = all - 1;  // low ends do not suffice, high do
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (suffice(middle) ? high : low) = middle;
    }
    // Little's law: so many run, each for so long.
    const auto running = static_cast<double>(std::max<int64_t>(num_running, 1));
    return static_cast<double>(high) * mean_life_s_ / running;
}

bool Pacing::hopeless(uint64_t id) const {
    const auto found = streams_.find(id);
    return found != streams_.end() && kWaitMargin * predicted_wait_s(id) > found->second.max_wait_s;
}

double Pacing::retry_after_s(uint64_t id) const {
    const auto found = streams_.find(id);
    if (found == streams_.end()) return kLeastRetryS;
    return std::max(predicted_wait_s(id) - found->second.max_wait_s / kWaitMargin, kLeastRetryS);
}

std::vector<uint64_t> Pacing::overdue() const {
    std::vector<uint64_t> ids;
    for (const auto& [deadline_s, id] : deadlines_) {
        if (deadline_s >= now_s_) break;
        ids.push_back(id);
    }
    return ids;
}

std::vector<StreamView> Pacing::streams() const {
    std::vector<StreamView> views;
    for (const auto& [id, stream] : streams_) {
        const double due_s = stream.floor.due_s();
        const double ahead_s = due_s < kForever ? due_s - now_s_ : 0;
        views.push_back({id, stream.floor.floor(), stream.num_emitted, ahead_s, stream.runs});
    }
    std::ranges::sort(views, {}, &StreamView::id);
    return views;
}

}  // namespace tokenspeed::policy

// SPDX-License-Identifier: MIT
#include "policy/pacing.h"

#include <algorithm>
#include <cmath>

namespace tokenspeed::policy {
namespace {

constexpr double kForever = std::numeric_limits<double>::infinity();
constexpr double kMemory = 64;       // rows, or steps, that moving means remember
constexpr double kLifeMemory = 16;   // streams
constexpr double kLongestPause = 1;  // seconds between two calls that count for ageing
constexpr double kLeastTokenS = 1e-7, kMostTokenS = 1;

void move(double* mean, double value, double memory = kMemory) {
    *mean += (value - *mean) / memory;
}

}  // namespace

Pacing::Pacing(const StepTimeModel* times, const PacingOptions& options)
    : times_(times), options_(options) {}

void Pacing::advance(TimeUs now) {
    const double now_s = static_cast<double>(now) * 1e-6;
    if (now_s <= now_s_) return;
    const double token_s =
        std::clamp(times_->coefficients()[kPrefillTokens], kLeastTokenS, kMostTokenS);
    aged_ += kAgeing * std::min(now_s - now_s_, kLongestPause) / token_s;
    now_s_ = now_s;
}

// ---- Who runs -----------------------------------------------------------------------------------

uint64_t Pacing::queued(uint64_t id, const Terms& terms, int32_t num_tokens, int32_t num_uncached) {
    Stream stream{};
    stream.floor = terms.tps_floor.value_or(options_.tps_floor);
    stream.max_wait_s = terms.max_wait_us.has_value()
                            ? static_cast<double>(*terms.max_wait_us) * 1e-6
                            : options_.max_wait_s;
    stream.deadline_s = now_s_ + stream.max_wait_s;
    stream.priority = terms.priority;
    stream.context = num_tokens;
    stream.num_uncached = num_uncached;
    stream.key = static_cast<uint64_t>(aged_) + static_cast<uint64_t>(num_uncached);
    if (stream.deadline_s < kForever) deadlines_.emplace(stream.deadline_s, id);
    join_queue(id, stream);
    streams_.insert_or_assign(id, stream);
    return stream.key;
}

bool Pacing::admits(uint64_t id) {
    if (num_running_ == 0) return true;
    const Stream& stream = streams_.at(id);
    const double floor = meetable(stream) ? stream.floor : 0;
    return holds(num_running_ + 1, running_context_ + stream.context,
                 std::max(floor, highest_floor()));
}

void Pacing::admitted(uint64_t id, int32_t num_uncached) {
    Stream& stream = streams_.at(id);
    if (!meetable(stream)) {
        ++num_unmeetable_;
        last_unmeetable_ = std::exchange(stream.floor, 0);
    }
    leave_queue(id, stream);
    stream.runs = true;
    stream.num_uncached = num_uncached;
    prefilling_.emplace(turn(id, stream), num_uncached);
    stream.admitted_s = now_s_;
    ++num_running_;
    running_context_ += stream.context;
    floors_.insert(stream.floor);
}

void Pacing::join_queue(uint64_t id, const Stream& stream) {
    waiting_.emplace(turn(id, stream), stream.num_uncached);
    waiting_context_ += stream.context;
}

// A stream that waits again later has no deadline any more: it has begun.
void Pacing::leave_queue(uint64_t id, Stream& stream) {
    waiting_.erase(turn(id, stream));
    waiting_context_ -= stream.context;
    deadlines_.erase({stream.deadline_s, id});
    stream.deadline_s = kForever;
}

// REQUIRES: the stream runs.
void Pacing::stop(uint64_t id, Stream& stream) {
    clear_due(id, stream);
    prefilling_.erase(turn(id, stream));
    stream.runs = false;
    --num_running_;
    running_context_ -= stream.context;
    floors_.erase(floors_.find(stream.floor));
}

void Pacing::retracted(uint64_t id) {
    Stream& stream = streams_.at(id);
    stop(id, stream);
    stream.num_uncached = static_cast<int32_t>(stream.context);
    join_queue(id, stream);
}

void Pacing::left(uint64_t id) {
    const auto found = streams_.find(id);
    if (found == streams_.end()) return;
    Stream& stream = found->second;
    if (stream.runs) {
        const double life_s = now_s_ - stream.admitted_s;
        if (mean_life_s_ == 0) mean_life_s_ = life_s;
        move(&mean_life_s_, life_s, kLifeMemory);
        stop(id, stream);
    } else {
        leave_queue(id, stream);
    }
    streams_.erase(found);
}

void Pacing::emitted(uint64_t id, int32_t num_tokens) {
    const auto found = streams_.find(id);
    if (found == streams_.end()) return;
    Stream& stream = found->second;
    stream.context += num_tokens;
    running_context_ += num_tokens;
    prefilling_.erase(turn(id, stream));
    if (stream.num_emitted > 0) move(&tokens_per_row_, num_tokens);
    stream.num_emitted += num_tokens;
    if (stream.floor == 0) return;
    double from = now_s_;
    if (stream.is_due) {
        num_late_ += stream.due_s < now_s_;
        from = std::clamp(stream.due_s, now_s_, now_s_ + kBankS);
    }
    set_due(id, stream, from + num_tokens / rate(stream.floor));
}

void Pacing::set_due(uint64_t id, Stream& stream, double due_s) {
    clear_due(id, stream);
    stream.due_s = due_s;
    stream.is_due = true;
    dues_.emplace(due_s, id);
}

void Pacing::clear_due(uint64_t id, Stream& stream) {
    if (stream.is_due) dues_.erase({stream.due_s, id});
    stream.is_due = false;
}

double Pacing::rate(double floor) { return (floor < 1 ? floor : std::ceil(floor)) / (1 - kBankS); }

// ---- What a step costs --------------------------------------------------------------------------

Features Pacing::features(int64_t rows, double drafts, double proposed, double most_proposed,
                          int64_t prefill, int64_t context) const {
    Features x{};
    x[kStep] = 1;
    x[kDecodeRows] = static_cast<double>(rows);
    x[kVerifyTokens] = drafts;
    x[kPrefillTokens] = static_cast<double>(prefill);
    x[kContextThousands] = static_cast<double>(context) / 1000;
    x[kExperts] = options_.experts.touched(x[kDecodeRows] + drafts + x[kPrefillTokens]);
    x[kProposeTokens] = proposed;
    x[kVerifies] = drafts > 0;
    x[kProposeDepth] = most_proposed;
    return x;
}

Features Pacing::step_features(int64_t prefill, int64_t prefill_context) const {
    return features(load_.num_decodes, load_.num_drafts, load_.num_proposed, load_.most_proposed,
                    prefill, load_.num_context + prefill_context);
}

// Between two tokens of one stream, prompts left out.
double Pacing::seconds_per_token(int64_t rows, int64_t context) const {
    const auto n = static_cast<double>(rows);
    const Features x =
        features(rows, n * drafts_per_row_, n * proposed_per_row_, most_proposed_, 0, context);
    return times_->seconds(x) / tokens_per_row_;
}

bool Pacing::holds(int64_t rows, int64_t context, double floor) const {
    return seconds_per_token(rows, context) * rate(floor) <= 1 - kLeastShare;
}

bool Pacing::meetable(const Stream& stream) const {
    if (stream.floor == 0 || times_->num_observed() < kKnown) return true;
    return holds(1, stream.context, stream.floor);
}

// ---- A step -------------------------------------------------------------------------------------

void Pacing::load(const StepLoad& load) {
    load_ = load;
    prefill_ = prefill_context_ = 0;
    wanted_ = false;
    if (load.num_decodes > 0) {
        move(&drafts_per_row_, static_cast<double>(load.num_drafts) / load.num_decodes);
        move(&proposed_per_row_, static_cast<double>(load.num_proposed) / load.num_decodes);
        move(&most_proposed_, load.most_proposed);
    }
    budget_s_ = kForever;
    if (load.must_run || dues_.empty()) return;
    const double start_s = ends_.empty() ? now_s_ : std::max(now_s_, ends_.back());
    // Each step in flight brings every stream a token first.
    const double in_flight_s = static_cast<double>(ends_.size()) / rate(highest_floor());
    budget_s_ = dues_.begin()->first + in_flight_s - start_s;
}

bool Pacing::fits(int64_t prefill, int64_t context) const {
    const Prediction step = times_->predict(step_features(prefill, context));
    return step.seconds + kMargin * step.stddev <= budget_s_;
}

int32_t Pacing::most_that_fits(int32_t start, int32_t num_wanted) const {
    const auto fit = [&](int32_t count) {
        return fits(prefill_ + count, prefill_context_ + start + count);
    };
    if (budget_s_ == kForever || fit(num_wanted)) return num_wanted;
    int32_t low = 0,
            high = (num_wanted + kLeastChunk - 1) / kLeastChunk;  // low fits, high does not
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        (fit(middle * kLeastChunk) ? low : high) = middle;
    }
    return low * kLeastChunk;
}

// Whether prompts have had so little that the least chunk is due.
bool Pacing::owes(int32_t start, int32_t num_wanted) const {
    const int32_t least = std::min(num_wanted, kLeastChunk);
    return owed_s_ >= times_->seconds(step_features(least, start + least)) -
                          times_->seconds(step_features(0, 0));
}

int32_t Pacing::chunk(uint64_t id, int32_t start, int32_t num_wanted) {
    wanted_ = true;
    int32_t count = most_that_fits(start, num_wanted);
    if (count == 0 && prefill_ == 0 && owes(start, num_wanted)) {
        count = std::min(num_wanted, kLeastChunk);
        ++num_forced_;
    }
    if (count == 0) return 0;
    const auto prompt = prefilling_.find(turn(id, streams_.at(id)));
    if (prompt != prefilling_.end()) prompt->second = std::max(prompt->second - count, 0);
    prefill_ += count;
    prefill_context_ += start + count;
    return count;
}

void Pacing::planned() {
    const double step_s = times_->seconds(step_features(prefill_, prefill_context_));
    const double prompts_s = step_s - times_->seconds(step_features(0, 0));
    if (wanted_ && planned_s_ >= 0) {
        prompt_tokens_ += static_cast<double>(prefill_) - prompt_tokens_ / kMemory;
        prompt_s_ += now_s_ - planned_s_ - prompt_s_ / kMemory;
    }
    planned_s_ = wanted_ ? now_s_ : -1;
    owed_s_ = wanted_ ? std::max(owed_s_ + kLeastShare * step_s - prompts_s, 0.0) : 0;
    ends_.push_back((ends_.empty() ? now_s_ : std::max(now_s_, ends_.back())) + step_s);
}

void Pacing::committed() {
    if (!ends_.empty()) ends_.pop_front();
}

// ---- Waits --------------------------------------------------------------------------------------

double Pacing::predicted_wait_s(uint64_t id) const {
    const auto found = streams_.find(id);
    if (found == streams_.end() || found->second.runs) return 0;
    const Stream& stream = found->second;
    int64_t num_before = 0, tokens_before = 0;
    for (const auto& [other, tokens] : waiting_) {
        if (other >= turn(id, stream)) break;
        ++num_before;
        tokens_before += tokens;
    }
    for (const auto& [other, tokens] : prefilling_) {
        if (other < turn(id, stream)) tokens_before += tokens;
    }
    const double prompts_s = prompt_tokens_ > 0 ? prompt_s_ / prompt_tokens_ : 0;
    return std::max(stream_wait_s(stream, num_before),
                    static_cast<double>(tokens_before) * prompts_s);
}

// Until so many streams have ended that this one and those before it may run.
double Pacing::stream_wait_s(const Stream& stream, int64_t num_before) const {
    const int64_t all = num_running_ + num_before + 1;
    const int64_t before_context =
        waiting_context_ / static_cast<int64_t>(waiting_.size()) * num_before;
    const auto context = static_cast<double>(running_context_ + before_context + stream.context);
    const double floor = std::max(meetable(stream) ? stream.floor : 0, highest_floor());
    const auto suffice = [&](int64_t num_ended) {
        const int64_t rows = all - num_ended;
        const double share = static_cast<double>(rows) / static_cast<double>(all);
        return rows <= 1 || (rows <= options_.max_num_seqs &&
                             holds(rows, static_cast<int64_t>(context * share), floor));
    };
    if (suffice(0)) return 0;
    if (mean_life_s_ == 0) return kUnknownWaitS;
    int64_t low = 0, high = all - 1;  // low ends do not suffice, high do
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (suffice(middle) ? high : low) = middle;
    }
    // Little's law: so many run, each for so long.
    const auto running = static_cast<double>(std::max<int64_t>(num_running_, 1));
    return static_cast<double>(high) * mean_life_s_ / running;
}

bool Pacing::hopeless(uint64_t id) const {
    const auto found = streams_.find(id);
    return found != streams_.end() && predicted_wait_s(id) > found->second.max_wait_s;
}

double Pacing::retry_after_s(uint64_t id) const {
    const auto found = streams_.find(id);
    if (found == streams_.end()) return kLeastRetryS;
    return std::max(predicted_wait_s(id) - found->second.max_wait_s, kLeastRetryS);
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
        const double ahead_s = stream.is_due ? stream.due_s - now_s_ : 0;
        views.push_back({id, stream.floor, stream.num_emitted, ahead_s, stream.runs});
    }
    std::ranges::sort(views, {}, &StreamView::id);
    return views;
}

}  // namespace tokenspeed::policy

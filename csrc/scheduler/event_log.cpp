// SPDX-License-Identifier: MIT
#include "scheduler/event_log.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "scheduler/scheduler.h"

namespace tokenspeed {

namespace {

constexpr char kMagic[8] = {'T', 'S', 'E', 'V', 'E', 'N', 'T', '5'};
static_assert(std::is_trivially_copyable_v<SchedulerOptions>);
static_assert(sizeof(SchedulerOptions) == 12 * sizeof(int32_t), "options are int32 words");

class Reader {
  public:
    explicit Reader(std::span<const uint8_t> bytes) : bytes_(bytes) {}
    bool done() const { return bytes_.empty(); }
    std::span<const uint8_t> take(size_t size) {
        if (size > bytes_.size()) throw std::invalid_argument("the event log is cut short");
        const auto front = bytes_.first(size);
        bytes_ = bytes_.subspan(size);
        return front;
    }
    template <class T>
    T value() {
        T value;
        std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
        return value;
    }
    template <class T>
    std::vector<T> array() {
        const auto count = value<uint32_t>();
        const auto bytes = take(count * sizeof(T));
        std::vector<T> values(count);
        if (count > 0) std::memcpy(values.data(), bytes.data(), bytes.size());
        return values;
    }

  private:
    std::span<const uint8_t> bytes_;
};

Retention retention(Reader& in) {
    Retention retention;
    retention.for_us = in.value<TimeUs>();
    retention.pinned = in.value<uint8_t>() != 0;
    return retention;
}

void replay_submit(Reader& in, Scheduler& scheduler) {
    NewRequest request;
    request.id = in.value<uint64_t>();
    request.max_tokens = in.value<int32_t>();
    request.min_tokens = in.value<int32_t>();
    request.read_cache = in.value<uint8_t>() != 0;
    request.prompt_logprobs = in.value<uint8_t>() != 0;
    request.user = in.value<uint64_t>();
    request.retention = retention(in);
    request.terms.priority = in.value<int32_t>();
    const auto prompt = in.array<int32_t>();
    const auto stop_ids = in.array<int32_t>();
    const auto salt = in.array<uint8_t>();
    request.prompt = prompt;
    request.stop_ids = stop_ids;
    request.salt = salt;
    scheduler.submit(request);
}

void replay_retain(Reader& in, Scheduler& scheduler) {
    const Retention asked = retention(in);
    const auto tokens = in.array<int32_t>();
    scheduler.retain(tokens, in.array<uint8_t>(), asked);
}

}  // namespace

EventLog::EventLog(const SchedulerOptions& options) : enabled_(options.record_events != 0) {
    if (!enabled_) return;
    raw(kMagic, sizeof(kMagic));
    raw(&options, sizeof(options));
}

void EventLog::raw(const void* data, size_t size) {
    const auto* first = static_cast<const uint8_t*>(data);
    bytes_.insert(bytes_.end(), first, first + size);
}
template <class T>
void EventLog::value(T value) {
    raw(&value, sizeof(value));
}
template <class T>
void EventLog::array(std::span<const T> values) {
    value(static_cast<uint32_t>(values.size()));
    raw(values.data(), values.size_bytes());
}

void EventLog::submit(const NewRequest& request) {
    if (!enabled_) return;
    value(kSubmit);
    value(request.id);
    value(request.max_tokens);
    value(request.min_tokens);
    value<uint8_t>(request.read_cache);
    value<uint8_t>(request.prompt_logprobs);
    value(request.user);
    value(request.retention.for_us);
    value<uint8_t>(request.retention.pinned);
    value(request.terms.priority);
    array(request.prompt);
    array(request.stop_ids);
    array(request.salt);
}

void EventLog::abort(uint64_t request_id) {
    if (!enabled_) return;
    value(kAbort);
    value(request_id);
}

void EventLog::plan() {
    if (enabled_) value(kPlan);
}

void EventLog::commit(std::span<const int32_t> result) {
    if (!enabled_) return;
    value(kCommit);
    array(result);
}

void EventLog::flush_cache() {
    if (enabled_) value(kFlushCache);
}

void EventLog::advance(int64_t now_us) {
    if (!enabled_) return;
    value(kAdvance);
    value(now_us);
}

void EventLog::retain(std::span<const int32_t> tokens, std::span<const uint8_t> salt,
                      const Retention& retention) {
    if (!enabled_) return;
    value(kRetain);
    value(retention.for_us);
    value<uint8_t>(retention.pinned);
    array(tokens);
    array(salt);
}

void EventLog::release(std::span<const int32_t> tokens, std::span<const uint8_t> salt) {
    if (!enabled_) return;
    value(kRelease);
    array(tokens);
    array(salt);
}

void EventLog::speculate(uint64_t request_id, std::span<const int32_t> draft, int32_t num_propose) {
    if (!enabled_) return;
    value(kSpeculate);
    value(request_id);
    value(num_propose);
    array(draft);
}

std::vector<std::vector<int32_t>> replay(std::span<const uint8_t> events) {
    Reader in(events);
    const auto magic = in.take(sizeof(kMagic));
    if (std::memcmp(magic.data(), kMagic, sizeof(kMagic)) != 0) {
        throw std::invalid_argument("not an event log");
    }
    Scheduler scheduler(in.value<SchedulerOptions>(), HashKey{});
    std::vector<std::vector<int32_t>> plans;
    while (!in.done()) {
        switch (in.value<uint8_t>()) {
            case EventLog::kSubmit:
                replay_submit(in, scheduler);
                break;
            case EventLog::kAbort:
                scheduler.abort(in.value<uint64_t>());
                break;
            case EventLog::kPlan:
                if (const auto plan = scheduler.next_plan(); !plan.empty()) {
                    plans.emplace_back(plan.begin(), plan.end());
                }
                break;
            case EventLog::kCommit:
                scheduler.commit(in.array<int32_t>());
                break;
            case EventLog::kFlushCache:
                scheduler.flush_cache();
                break;
            case EventLog::kAdvance:
                scheduler.advance(in.value<TimeUs>());
                break;
            case EventLog::kRetain:
                replay_retain(in, scheduler);
                break;
            case EventLog::kRelease: {
                const auto tokens = in.array<int32_t>();
                scheduler.release(tokens, in.array<uint8_t>());
                break;
            }
            case EventLog::kSpeculate: {
                const auto request_id = in.value<uint64_t>();
                const auto num_propose = in.value<int32_t>();
                scheduler.speculate(request_id, in.array<int32_t>(), num_propose);
                break;
            }
            default:
                throw std::invalid_argument("unknown event");
        }
    }
    return plans;
}

}  // namespace tokenspeed

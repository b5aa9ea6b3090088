// SPDX-License-Identifier: MIT
// The event log: everything that was told to a scheduler, in order, so that another one can be told
// the same. The key of the prefix hashes is not in it: no plan depends on it.
//
//   log:    "TSEVENT5", the options as int32 words, then records
//   record: one byte of kind, then its fields, little-endian; arrays with a 32-bit count in front
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tokenspeed {

struct SchedulerOptions;
struct NewRequest;
struct Retention;

class EventLog {
  public:
    enum Kind : uint8_t {
        kSubmit = 1,
        kAbort = 2,
        kPlan = 3,
        kCommit = 4,
        kFlushCache = 5,
        kAdvance = 6,
        kRetain = 7,
        kRelease = 8,
        kSpeculate = 9
    };

    explicit EventLog(const SchedulerOptions& options);
    void submit(const NewRequest& request);
    void abort(uint64_t request_id);
    void plan();
    void commit(std::span<const int32_t> result);
    void flush_cache();
    void advance(int64_t now_us);
    void retain(std::span<const int32_t> tokens, std::span<const uint8_t> salt,
                const Retention& retention);
    void release(std::span<const int32_t> tokens, std::span<const uint8_t> salt);
    void speculate(uint64_t request_id, std::span<const int32_t> draft, int32_t num_propose);
    const std::vector<uint8_t>& bytes() const { return bytes_; }

  private:
    void raw(const void* data, size_t size);
    template <class T>
    void value(T value);
    template <class T>
    void array(std::span<const T> values);

    bool enabled_;
    std::vector<uint8_t> bytes_;
};

// Tells a fresh scheduler the events and returns each plan it made. Throws std::invalid_argument
// for bytes that are no event log.
std::vector<std::vector<int32_t>> replay(std::span<const uint8_t> events);

}  // namespace tokenspeed

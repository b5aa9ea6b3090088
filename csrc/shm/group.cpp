// SPDX-License-Identifier: MIT
#include "group.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <thread>
#include <utility>

namespace tokenspeed::shm {
namespace {

constexpr size_t kMailbox = sizeof(ChannelState) + kMailboxBytes;
constexpr size_t kTable = sizeof(Member) * kMaxMembers;
const char* const kNames[] = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all",
                              "broadcast"};

uint64_t mix(uint64_t hash, uint64_t value) {
    return (hash ^ value) * 0x9E3779B97F4A7C15u ^ (hash >> 29);
}

uint64_t hash_of(uint64_t first, const Pieces& pieces) {
    uint64_t hash = mix(mix(first, pieces.outer), pieces.inner);
    for (const int64_t size : pieces.sizes) hash = mix(hash, size);
    return hash;
}

// Calls body(offset in the whole, offset in the piece, bytes) for every run of bytes of `piece` in
// [begin, end) of the whole tensor.
template <typename Body>
void for_runs(const Pieces& pieces, int piece, int64_t begin, int64_t end, Body&& body) {
    const int64_t row = pieces.total() * pieces.inner;
    const int64_t length = pieces.sizes[piece] * pieces.inner;
    const int64_t start = pieces.offset(piece) * pieces.inner;
    if (row == 0 || length == 0) return;
    for (int64_t o = begin / row; o < pieces.outer && o * row < end; ++o) {
        const int64_t low = std::max(begin, o * row + start);
        const int64_t high = std::min(end, o * row + start + length);
        if (low < high) body(low, low - o * row - start + o * length, high - low);
    }
}

}  // namespace

int64_t Pieces::total() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{0}); }

int64_t Pieces::offset(int piece) const {
    return std::accumulate(sizes.begin(), sizes.begin() + piece, int64_t{0});
}

// ---- The segment: members, areas, mailboxes ----------------------------------------------------

size_t Group::segment_bytes(int size) {
    return kTable + sizeof(Area) * size + kMailbox * size * size;
}

Segment Group::connect(const std::string& name, int size, int index, Clock::time_point deadline,
                       const Members* parent, void (*on_tick)()) {
    if (size < 1 || size > kMaxMembers || index < 0 || index >= size)
        throw std::invalid_argument("a group of 1 to 64 ranks and a place in it are needed");
    if (index == 0) return Segment::create(name, segment_bytes(size));
    Segment segment;
    for (auto next = Clock::now() + kTick; !segment.open(name, segment_bytes(size));) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        if (Clock::now() > deadline) throw RankDied("no rank made shared memory " + name);
        if (Clock::now() < next) continue;
        next = Clock::now() + kTick;
        if (on_tick != nullptr) on_tick();
        if (parent != nullptr) parent->check();
    }
    return segment;
}

Group::Group(const std::string& name, std::vector<int> ranks, int index,
             std::chrono::nanoseconds timeout, const Members* parent, void (*on_tick)())
    : segment_(connect(name, static_cast<int>(ranks.size()), index, Clock::now() + timeout, parent,
                       on_tick)),
      memory_(segment_.data()),
      members_(reinterpret_cast<Member*>(memory_), std::move(ranks), index, timeout, on_tick) {
    try {
        meet();
    } catch (...) {
        segment_.unlink();
        throw;
    }
    segment_.unlink();
}

Group::Group(std::byte* memory, std::vector<int> ranks, int index, std::chrono::nanoseconds timeout)
    : memory_(memory),
      members_(reinterpret_cast<Member*>(memory_), std::move(ranks), index, timeout, nullptr) {
    meet();
}

void Group::meet() {
    members_.join();
    area(index()).bell.ring();
    for (int i = 0; i < size(); ++i) {
        members_.wait(area(i).bell, i, [&] { return members_.present(i); });
    }
}

Group::~Group() { members_.leave(); }

Group::Area& Group::area(int member) const {
    return reinterpret_cast<Area*>(memory_ + kTable)[member];
}

Channel Group::channel(int from, int to) const {
    std::byte* const mailbox =
        memory_ + kTable + sizeof(Area) * size() + kMailbox * (from * size() + to);
    return Channel(members_, reinterpret_cast<ChannelState*>(mailbox),
                   mailbox + sizeof(ChannelState), kMailboxBytes, from, {to});
}

// ---- Rounds ------------------------------------------------------------------------------------

Group::Half& Group::begin(const Stamp& stamp) {
    for (int i = 0; i < size(); ++i) {
        Area& theirs = area(i);
        members_.wait(theirs.bell, i,
                      [&] { return static_cast<int32_t>(theirs.announced.load() - round_) >= 0; });
    }
    ++round_;
    stamp_ = stamp;
    Half& half = area(index()).halves[round_ % 2];
    half.stamp = stamp;
    return half;
}

void Group::announce() {
    Area& mine = area(index());
    mine.announced.store(round_);
    mine.bell.ring();
}

const Group::Half& Group::other(int member) {
    Area& theirs = area(member);
    members_.wait(theirs.bell, member,
                  [&] { return static_cast<int32_t>(theirs.announced.load() - round_) >= 0; });
    const Half& half = theirs.halves[round_ % 2];
    if (half.stamp != stamp_) {
        const auto say = [&](int who, const Stamp& stamp) {
            return "rank " + std::to_string(members_.rank(who)) + " calls " +
                   kNames[static_cast<int>(stamp.kind)];
        };
        const bool same_kind = half.stamp.kind == stamp_.kind;
        throw std::runtime_error("ranks disagree: " + say(index(), stamp_) + ", " +
                                 say(member, half.stamp) +
                                 (same_kind ? " of other shapes, sizes, dtype or root" : ""));
    }
    return half;
}

// ---- Collectives -------------------------------------------------------------------------------

void Group::all_reduce(DType dtype, int64_t count, std::byte* x) {
    const int64_t element = static_cast<int64_t>(size_of(dtype)), bytes = count * element;
    const Stamp stamp{Kind::kAllReduce, static_cast<uint32_t>(dtype), static_cast<uint64_t>(count)};
    if (size() > 2 && bytes > static_cast<int64_t>(kOneShotBytes))
        return sum_shared(stamp, dtype, count, x);
    const std::byte* sources[kMaxMembers];
    for (int64_t done = 0; done < bytes; done += kHalfBytes) {
        const int64_t step = std::min<int64_t>(kHalfBytes, bytes - done);
        std::memcpy(begin(stamp).data, x + done, step);
        announce();
        for (int i = 0; i < size(); ++i) sources[i] = other(i).data;
        sum(dtype, sources, size(), step / element, x + done);
    }
}

// Each rank sums an equal part of every half-full, and hands its part to the others.
void Group::sum_shared(const Stamp& stamp, DType dtype, int64_t count, std::byte* x) {
    const int64_t element = static_cast<int64_t>(size_of(dtype));
    const int64_t chunk = static_cast<int64_t>(kHalfBytes) / element;
    const std::byte* sources[kMaxMembers];
    for (int64_t done = 0; done < count; done += chunk) {
        const int64_t step = std::min(chunk, count - done);
        const auto cut = [&](int i) { return step * i / size() * element; };
        std::byte* const out = x + done * element;
        const int64_t low = cut(index()), high = cut(index() + 1);
        std::memcpy(begin(stamp).data, out, step * element);
        announce();
        for (int i = 0; i < size(); ++i) sources[i] = other(i).data + low;
        sum(dtype, sources, size(), (high - low) / element, out + low);
        std::memcpy(begin(stamp).data, out + low, high - low);
        announce();
        for (int i = 0; i < size(); ++i) {
            if (i != index()) std::memcpy(out + cut(i), other(i).data, cut(i + 1) - cut(i));
        }
    }
}

void Group::all_gather(const Pieces& pieces, const std::byte* x, std::byte* out) {
    const Stamp stamp{Kind::kAllGather, 0, hash_of(0, pieces)};
    const int64_t unit = pieces.outer * pieces.inner;
    const int64_t mine = pieces.sizes[index()] * unit, row = pieces.total() * pieces.inner;
    const int64_t most = *std::max_element(pieces.sizes.begin(), pieces.sizes.end()) * unit;
    for (int64_t done = 0; done < most; done += kHalfBytes) {
        Half& half = begin(stamp);
        if (done < mine)
            std::memcpy(half.data, x + done, std::min<int64_t>(kHalfBytes, mine - done));
        announce();
        for (int i = 0; i < size(); ++i) {
            const std::byte* const data = other(i).data;
            const int64_t length = pieces.sizes[i] * pieces.inner;
            const int64_t start = pieces.offset(i) * pieces.inner;
            const int64_t end = std::min<int64_t>(done + kHalfBytes, pieces.outer * length);
            for (int64_t at = done; at < end;) {
                const int64_t o = at / length;
                const int64_t step = std::min(end, (o + 1) * length) - at;
                std::memcpy(out + o * row + start + (at - o * length), data + (at - done), step);
                at += step;
            }
        }
    }
}

void Group::reduce_scatter(DType dtype, const Pieces& pieces, const std::byte* x, std::byte* out) {
    const Stamp stamp{Kind::kReduceScatter, static_cast<uint32_t>(dtype), hash_of(1, pieces)};
    const int64_t element = static_cast<int64_t>(size_of(dtype));
    const int64_t bytes = pieces.outer * pieces.total() * pieces.inner;
    const std::byte* halves[kMaxMembers];
    const std::byte* sources[kMaxMembers];
    for (int64_t done = 0; done < bytes; done += kHalfBytes) {
        const int64_t end = std::min<int64_t>(done + kHalfBytes, bytes);
        std::memcpy(begin(stamp).data, x + done, end - done);
        announce();
        for (int i = 0; i < size(); ++i) halves[i] = other(i).data;
        for_runs(pieces, index(), done, end, [&](int64_t from, int64_t to, int64_t length) {
            for (int i = 0; i < size(); ++i) sources[i] = halves[i] + (from - done);
            sum(dtype, sources, size(), length / element, out + to);
        });
    }
}

void Group::all_to_all(const std::vector<int64_t>& send, const std::byte* x,
                       const std::vector<int64_t>& receive, std::byte* out) {
    const Stamp stamp{Kind::kAllToAll, 0, 0};
    const int64_t mine = std::accumulate(send.begin(), send.end(), int64_t{0});
    int64_t most = 1;  // of any rank's bytes; known after the first round, which always is
    for (int64_t done = 0; done < most; done += kHalfBytes) {
        Half& half = begin(stamp);
        half.offsets[0] = 0;
        std::partial_sum(send.begin(), send.end(), half.offsets + 1);
        if (done < mine)
            std::memcpy(half.data, x + done, std::min<int64_t>(kHalfBytes, mine - done));
        announce();
        int64_t to = 0;
        for (int i = 0; i < size(); to += receive[i++]) {
            const Half& theirs = other(i);
            const int64_t begin = theirs.offsets[index()], end = theirs.offsets[index() + 1];
            if (end - begin != receive[i])
                throw std::runtime_error("ranks disagree: rank " +
                                         std::to_string(members_.rank(i)) + " sends " +
                                         std::to_string(end - begin) + " bytes to rank " +
                                         std::to_string(members_.rank(index())) +
                                         ", which expects " + std::to_string(receive[i]));
            most = std::max(most, theirs.offsets[size()]);
            const int64_t low = std::max(begin, done);
            const int64_t high = std::min<int64_t>(end, done + kHalfBytes);
            if (low < high)
                std::memcpy(out + to + (low - begin), theirs.data + (low - done), high - low);
        }
    }
}

void Group::broadcast(int64_t bytes, int root, std::byte* x) {
    const Stamp stamp{Kind::kBroadcast, static_cast<uint32_t>(root), static_cast<uint64_t>(bytes)};
    for (int64_t done = 0; done < bytes; done += kHalfBytes) {
        const int64_t step = std::min<int64_t>(kHalfBytes, bytes - done);
        Half& half = begin(stamp);
        if (root == index()) std::memcpy(half.data, x + done, step);
        announce();
        if (root != index()) std::memcpy(x + done, other(root).data, step);
    }
}

void Group::send(int64_t bytes, int to, const std::byte* x) {
    channel(index(), to).send(x, static_cast<uint64_t>(bytes));
}

void Group::receive(int64_t bytes, int source, std::byte* x) {
    Channel mailbox = channel(source, index());
    const uint64_t sent = mailbox.next(0);
    if (sent != static_cast<uint64_t>(bytes))
        throw std::runtime_error("ranks disagree: rank " + std::to_string(members_.rank(source)) +
                                 " sent " + std::to_string(sent) + " bytes, rank " +
                                 std::to_string(members_.rank(index())) + " expects " +
                                 std::to_string(bytes));
    mailbox.receive(0, x, sent);
}

}  // namespace tokenspeed::shm

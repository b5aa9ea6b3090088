// SPDX-License-Identifier: MIT
// SipHash-2-4 with 128 bits of output (Aumasson, Bernstein: "SipHash: a fast short-input PRF", and
// its 128-bit variant). Keyed, so that nobody without the key can aim for a collision. Knows bytes.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tokenspeed {

static_assert(std::endian::native == std::endian::little, "words are read as they stand");

struct Hash128 {
    uint64_t low = 0;
    uint64_t high = 0;
    friend bool operator==(const Hash128&, const Hash128&) = default;
};

struct HashKey {
    uint64_t k0 = 0;
    uint64_t k1 = 0;
};

class SipHash128 {
  public:
    explicit SipHash128(HashKey key)
        : v0_(key.k0 ^ 0x736f6d6570736575),
          v1_(key.k1 ^ 0x646f72616e646f6d ^ 0xee),
          v2_(key.k0 ^ 0x6c7967656e657261),
          v3_(key.k1 ^ 0x7465646279746573) {}

    // Absorbs eight bytes.
    void word(uint64_t m) {
        v3_ ^= m;
        round();
        round();
        v0_ ^= m;
        length_ += 8;
    }

    // Absorbs the last `size` bytes and returns the hash. The object is spent.
    Hash128 finish(const void* data, size_t size) {
        const auto* bytes = static_cast<const unsigned char*>(data);
        for (; size >= 8; bytes += 8, size -= 8) {
            uint64_t m;
            std::memcpy(&m, bytes, 8);
            word(m);
        }
        uint64_t tail = (length_ + size) << 56;
        for (size_t i = 0; i < size; ++i) tail |= uint64_t{bytes[i]} << (8 * i);
        word(tail);
        Hash128 hash;
        v2_ ^= 0xee;
        hash.low = four_rounds();
        v1_ ^= 0xdd;
        hash.high = four_rounds();
        return hash;
    }

  private:
    void round() {
        v0_ += v1_;
        v2_ += v3_;
        v1_ = std::rotl(v1_, 13) ^ v0_;
        v3_ = std::rotl(v3_, 16) ^ v2_;
        v0_ = std::rotl(v0_, 32) + v3_;
        v2_ += v1_;
        v3_ = std::rotl(v3_, 21) ^ v0_;
        v1_ = std::rotl(v1_, 17) ^ v2_;
        v2_ = std::rotl(v2_, 32);
    }

    uint64_t four_rounds() {
        for (int i = 0; i < 4; ++i) round();
        return v0_ ^ v1_ ^ v2_ ^ v3_;
    }

    uint64_t v0_, v1_, v2_, v3_;
    uint64_t length_ = 0;
};

inline Hash128 siphash128(HashKey key, const void* data, size_t size) {
    return SipHash128(key).finish(data, size);
}

// The hash of `parent` followed by `data`: one link of a chain.
inline Hash128 chain_hash(HashKey key, Hash128 parent, const void* data, size_t size) {
    SipHash128 hash(key);
    hash.word(parent.low);
    hash.word(parent.high);
    return hash.finish(data, size);
}

}  // namespace tokenspeed

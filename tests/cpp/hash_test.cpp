// SPDX-License-Identifier: MIT
// SipHash-2-4-128 against the vectors its authors publish: key 00..0f, input 00 01 02 ...
#include "scheduler/hash.h"

#include <array>
#include <cstring>
#include <vector>

#include "scheduler/check.h"

namespace {

using tokenspeed::Hash128;
using tokenspeed::HashKey;

// The reference vectors of the lengths 0 to 3.
struct Vector {
    size_t length;
    std::array<unsigned char, 16> hash;
};
constexpr Vector kVectors[] = {
    {0,
     {0xA3, 0x81, 0x7F, 0x04, 0xBA, 0x25, 0xA8, 0xE6, 0x6D, 0xF6, 0x72, 0x14, 0xC7, 0x55, 0x02,
      0x93}},
    {1,
     {0xDA, 0x87, 0xC1, 0xD8, 0x6B, 0x99, 0xAF, 0x44, 0x34, 0x76, 0x59, 0x11, 0x9B, 0x22, 0xFC,
      0x45}},
    {2,
     {0x81, 0x77, 0x22, 0x8D, 0xA4, 0xA4, 0x5D, 0xC7, 0xFC, 0xA3, 0x8B, 0xDE, 0xF6, 0x0A, 0xFF,
      0xE4}},
    {3,
     {0x9C, 0x70, 0xB6, 0x0C, 0x52, 0x67, 0xA9, 0x4E, 0x5F, 0x33, 0xB6, 0xB0, 0x29, 0x85, 0xED,
      0x51}},
};

HashKey counting_key() {
    unsigned char bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<unsigned char>(i);
    HashKey key;
    std::memcpy(&key, bytes, sizeof(key));
    return key;
}

std::vector<unsigned char> counting(size_t length) {
    std::vector<unsigned char> bytes(length);
    for (size_t i = 0; i < length; ++i) bytes[i] = static_cast<unsigned char>(i);
    return bytes;
}

void published_vectors() {
    for (const Vector& vector : kVectors) {
        const auto data = counting(vector.length);
        const Hash128 hash = tokenspeed::siphash128(counting_key(), data.data(), data.size());
        TS_CHECK(std::memcmp(&hash, vector.hash.data(), 16) == 0);
    }
}

// A link of the chain is the hash of the parent's bytes followed by the data, at every length.
void chain_is_concatenation() {
    const Hash128 parent = tokenspeed::siphash128(counting_key(), "salt", 4);
    for (size_t length = 0; length < 70; ++length) {
        auto data = counting(length);
        const Hash128 link =
            tokenspeed::chain_hash(counting_key(), parent, data.data(), data.size());
        const auto* first = reinterpret_cast<const unsigned char*>(&parent);
        data.insert(data.begin(), first, first + sizeof(parent));
        TS_CHECK(link == tokenspeed::siphash128(counting_key(), data.data(), data.size()));
        TS_CHECK(link != tokenspeed::siphash128(HashKey{}, data.data(), data.size()));
    }
}

}  // namespace

int main() {
    published_vectors();
    chain_is_concatenation();
    return 0;
}

// SPDX-License-Identifier: MIT
// The schedule of latent attention against a plain walk over all units: every unit is computed
// once, by the CTA that owns it; spans are even; no two pairs of CTA and block share a slot; a
// query row's partial results are those of the pairs that hold a key it sees.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "cuda/mla_schedule.h"

namespace {

using namespace tokenspeed::cuda;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                        \
        }                                                                        \
    } while (false)

struct Row {
    int32_t queries;
    int32_t tokens;
};

struct Unit {
    int32_t row;
    int32_t block;
    int32_t tile;
    int32_t item;
};

std::vector<Unit> LineOf(const std::vector<Row>& rows, int32_t heads, int32_t block) {
    std::vector<Unit> line;
    int32_t item = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
        const RowWork work = WorkOf(rows[r].queries, rows[r].tokens, heads, block);
        for (int32_t b = 0; b < work.blocks; ++b, ++item) {
            for (int32_t t = 0; t < work.tiles; ++t) {
                line.push_back({static_cast<int32_t>(r), b, t, item});
            }
        }
    }
    return line;
}

// Slots by (item): the CTAs that share units with it, in order.
std::map<int32_t, std::vector<int32_t>> SpansOf(const std::vector<Unit>& line, int32_t ctas) {
    const int32_t total = static_cast<int32_t>(line.size());
    const int32_t parts = PartsOf(ctas, total);
    std::map<int32_t, std::vector<int32_t>> owners;
    std::set<int32_t> slots;
    int32_t end = 0;
    for (int32_t cta = 0; cta < parts; ++cta) {
        const int32_t begin = SpanStart(cta, total, parts);
        CHECK(begin == end);
        end = SpanStart(cta + 1, total, parts);
        CHECK(end - begin == total / parts || end - begin == (total + parts - 1) / parts);
        int32_t last_item = -1;
        for (int32_t u = begin; u < end; ++u) {
            CHECK(Owner(u, total, parts) == cta);
            const int32_t item = line[static_cast<size_t>(u)].item;
            if (item != last_item) {
                CHECK(slots.insert(SlotOf(cta, item)).second);
                owners[item].push_back(cta);
                last_item = item;
            }
        }
    }
    CHECK(end == total);
    return owners;
}

void CheckPartials(const std::vector<Row>& rows, int32_t heads, int32_t block, int32_t ctas) {
    const std::vector<Unit> line = LineOf(rows, heads, block);
    const int32_t total = static_cast<int32_t>(line.size());
    const auto owners = SpansOf(line, ctas);
    Before before{0, 0};
    for (const Row& row : rows) {
        const RowWork work = WorkOf(row.queries, row.tokens, heads, block);
        for (int32_t place = 0; work.units() > 0 && place < row.queries * heads; ++place) {
            const Partials found =
                PartialsOf(place, row.queries, row.tokens, before, total, ctas, heads, block);
            const int32_t item = before.items + place / block;
            const std::vector<int32_t>& ctas_of_item = owners.at(item);
            CHECK(found.line == place % block);
            CHECK(found.slot == SlotOf(ctas_of_item.front(), item));
            CHECK(found.count >= 1 && found.count <= static_cast<int32_t>(ctas_of_item.size()));
            // What the row sees lies in tiles that the counted CTAs have.
            const int32_t sees = row.tokens - row.queries + place / heads + 1;
            const int32_t unit = before.units + place / block * work.tiles + (sees - 1) / kTile;
            CHECK(Owner(unit, total, PartsOf(ctas, total)) < ctas_of_item.front() + found.count);
        }
        before.units += work.units();
        before.items += work.blocks;
    }
}

}  // namespace

int main() {
    std::mt19937 random(1);
    const auto below = [&random](int32_t n) { return static_cast<int32_t>(random() % n); };
    for (int round = 0; round < 2000; ++round) {
        std::vector<Row> rows(1 + below(6));
        for (Row& row : rows) {
            row.queries = below(4) == 0 ? 0 : 1 + below(9);
            row.tokens = row.queries == 0 ? 0 : row.queries + below(below(2) == 0 ? 10 : 900);
        }
        const int32_t heads[] = {1, 5, 16, 32, 128};
        const int32_t blocks[] = {16, 32, 64};
        CheckPartials(rows, heads[below(5)], blocks[below(3)], 1 + below(140));
    }
    // Products that do not fit 32 bits.
    const int32_t total = 2'000'000'000;
    for (const int32_t cta : {0, 1, 77, 131}) {
        CHECK(Owner(SpanStart(cta, total, 132), total, 132) == cta);
        CHECK(Owner(SpanStart(cta + 1, total, 132) - 1, total, 132) == cta);
    }
    std::puts("ok");
}

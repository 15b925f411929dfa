#include "kvpool/view.h"

#include "fixtures.h"

using namespace kvpool;

namespace {

// Four stored blocks, and a client's view of them.
struct Viewed {
    Pool pool{2};
    uint32_t client = pool.add_client();
    std::vector<SlotRef> refs = pool.store(client, keys_of(0, 4));
    PoolView view{pool.folder.pool()};
};

}  // namespace

TEST(leases_of_a_view_are_its_clients) {
    Viewed v;
    CHECK_THROWS(std::runtime_error, v.view.lease(v.refs));  // whose?
    v.view.attach_client(v.client);
    SlotRef stale{v.refs[2].slot, v.refs[2].generation + 1};
    CHECK(v.view.lease({v.refs[0], stale, v.refs[3]}) == (std::vector<bool>{true, false, true}));
    CHECK_EQ(v.view.leased_slots(), 2u);
    CHECK_EQ(count_leases(v.pool.owner->file(), v.client), 2u);
    v.view.check_integrity();
    CHECK_THROWS(std::runtime_error, v.view.attach_client(v.client + 1));
    v.view.release({v.refs[0], v.refs[3]});
    CHECK_EQ(v.view.leased_slots(), 0u);
    CHECK_EQ(count_leases(v.pool.owner->file(), v.client), 0u);
    v.view.attach_client(v.client + 1);
    CHECK_THROWS(std::invalid_argument, v.view.attach_client(kMaxClients));
}

TEST(a_payload_is_its_slots_only) {
    Viewed v;
    PoolView::Bytes bytes = v.view.payload(v.refs[1]);
    CHECK_EQ(bytes.size, kSlotBytes);
    CHECK(bytes.data == v.view.file()->payload(v.refs[1].slot));
    auto slots = static_cast<uint32_t>(v.view.file()->geometry().num_slots());
    CHECK_THROWS(std::invalid_argument, v.view.payload({0, 0}));
    CHECK_THROWS(std::invalid_argument, v.view.payload({slots, 1}));
    CHECK_THROWS(std::invalid_argument, v.view.payload({v.refs[1].slot, v.refs[1].generation + 1}));
}

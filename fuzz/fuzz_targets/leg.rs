//! Datagrams of strangers into a relay, before, during and after its handshakes: on the virtual
//! clock of the simulated network, with real ends on both sides.
//!
//! Input: a byte that says how far the call is, then for each datagram two bytes of flags and
//! length, and its contents.
#![cfg_attr(fuzzing, no_main)]
#![allow(dead_code)]

#[path = "../../src/proto/tests/sim/net.rs"]
mod net;
#[path = "../../src/proto/tests/sim/peer.rs"]
mod peer;
#[path = "../../src/proto/tests/sim/sdp.rs"]
mod sdp;
#[path = "../../src/proto/tests/sim/world.rs"]
mod world;

use auralink_fuzz::fuzz_target;
use auralink_proto::relay::Side;
use auralink_proto::stun::Path;
use world::{Options, World, addr, back, client_addr, front, server_addr};

fuzz_target!(|data: &[u8]| {
    let Some((&stage, mut rest)) = data.split_first() else {
        return;
    };
    // The call is up after some 200 ms.
    let options = Options {
        answer_active: stage & 0x80 == 0,
        ..Options::default()
    };
    let mut world = World::new(u64::from(stage), options);
    world.join();
    world.run_ms(u64::from(stage & 0x7f) * 5);
    let up = world.up();
    let paths = |world: &World| {
        let relay = world.relay.as_ref();
        relay.map(|relay| [Side::Client, Side::Server].map(|side| relay.leg(side).path()))
    };
    let before = paths(&world);
    let mut strangers = true;
    while let Some((&[flags, len], tail)) = rest.split_first_chunk::<2>() {
        let len = (usize::from(flags & 0x0f) << 8 | usize::from(len)).min(tail.len());
        let (datagram, tail) = tail.split_at(len);
        rest = tail;
        let (side, local, real) = if flags & 0x80 == 0 {
            (Side::Client, front(), client_addr())
        } else {
            (Side::Server, back(), server_addr())
        };
        let spoofed = flags & 0x40 != 0;
        strangers &= !spoofed;
        let path = Path {
            local,
            remote: if spoofed { real } else { addr("192.0.2.9:9") },
            tcp: flags & 0x20 != 0 && side == Side::Client,
        };
        world.inject(side, path, datagram);
        if flags & 0x10 != 0 {
            world.run_ms(1);
        }
    }
    if up {
        // Nothing in it was authentic.
        assert_eq!(before, paths(&world));
        world.run_ms(100);
        assert!(!world.relay().is_closed(), "{}", world.report());
        assert!(world.server.rtp.is_empty() && world.client.rtp.is_empty());
        assert!(world.server.data.is_empty() && world.client.data.is_empty());
    } else if strangers {
        assert!(world.run_until(20, World::up), "{}", world.report());
    } else {
        world.run_ms(1000);
    }
});

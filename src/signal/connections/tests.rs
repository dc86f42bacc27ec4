#![allow(clippy::unwrap_used)]

use super::*;

const REST: Duration = Duration::from_secs(4);

fn connections(most: usize, per_address: usize) -> Arc<Connections> {
    let limits = Limits {
        connections_per_address: per_address,
        handshakes: 8,
        ..Limits::default()
    };
    Connections::new(&limits, most, REST)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Whether its place went to another one.
async fn gone(seat: &Seat) -> bool {
    tokio::select! {
        biased;
        due = seat.due() => due == Due::Over,
        () = std::future::ready(()) => false,
    }
}

#[tokio::test]
async fn who_has_kept_us_waiting_longest_goes() {
    let all = connections(3, 0);
    let [a, b, c] = ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|at| all.admit(ip(at)).unwrap());
    // The first is at work, the second begins its request only now: the third is the one.
    a.working(true);
    b.received(100);
    let d = all.admit(ip("192.0.2.4")).unwrap();
    assert!(gone(&c).await && !gone(&a).await && !gone(&b).await && !gone(&d).await);
    let _e = all.admit(ip("192.0.2.5")).unwrap();
    assert!(gone(&b).await);
    // Who has been answered is at the end of the queue.
    a.answered();
    let _f = all.admit(ip("192.0.2.6")).unwrap();
    assert!(gone(&d).await && !gone(&a).await);
}

#[tokio::test]
async fn who_is_at_work_never_goes() {
    let all = connections(2, 0);
    let [a, b] = ["192.0.2.1", "192.0.2.2"].map(|at| all.admit(ip(at)).unwrap());
    a.working(true);
    b.upgraded();
    assert_eq!(all.admit(ip("192.0.2.3")).err(), Some(Full::All));
    // A body that doesn't come is waited for.
    a.waits(a.request());
    let c = all.admit(ip("192.0.2.3")).unwrap();
    assert!(gone(&a).await && !gone(&c).await && !gone(&b).await);
    c.working(true);
    drop(b);
    all.freed().await;
    assert!(all.admit(ip("192.0.2.4")).is_ok());
}

#[tokio::test]
async fn an_address_takes_only_its_own_places() {
    let all = connections(100, 2);
    let others = all.admit(ip("198.51.100.1")).unwrap();
    let [a, b] = [1, 2].map(|_| all.admit(ip("192.0.2.1")).unwrap());
    let c = all.admit(ip("::ffff:192.0.2.1")).unwrap();
    assert!(
        gone(&a).await && !gone(&others).await,
        "its own oldest goes"
    );
    b.working(true);
    c.working(true);
    assert_eq!(all.admit(ip("192.0.2.1")).err(), Some(Full::Address));
    // Sessions don't count: a whole office may be behind one address.
    b.upgraded();
    assert!(all.admit(ip("192.0.2.1")).is_ok());
    // One home has a /64.
    let homes = ["2001:db8::1", "2001:db8::2:0:0:1", "2001:db8:0:1::1"].map(|at| Block::of(ip(at)));
    assert!(homes[0] == homes[1] && homes[0] != homes[2]);
}

#[tokio::test]
async fn an_address_has_half_of_the_handshakes() {
    let all = connections(100, 50);
    let seats: Vec<_> = (0..5)
        .map(|_| all.admit(ip("192.0.2.1")).unwrap())
        .collect();
    let mut shares: Vec<_> = seats.iter().filter_map(Seat::handshake).collect();
    assert_eq!(shares.len(), 4);
    let other = all.admit(ip("192.0.2.2")).unwrap();
    assert!(other.handshake().is_some());
    shares.pop();
    assert!(seats[4].handshake().is_some());
    drop((shares, seats, other));
    let inner = all.lock();
    assert!(
        inner.addresses.is_empty() && inner.open.is_empty(),
        "nothing stays"
    );
}

#[tokio::test]
async fn memory_of_unfinished_requests_is_bounded() {
    let all = connections(100_000, 0);
    let mut seats = Vec::new();
    for _ in 0..2_000 {
        let seat = all.admit(ip("192.0.2.1")).unwrap();
        seat.received(4_000);
        for _ in 0..31 {
            seat.hold_more(4_000);
        }
        seats.push(seat);
    }
    assert!(all.lock().held <= HELD);
    assert!(gone(&seats[0]).await, "the oldest went");
    assert!(!gone(&seats[1_999]).await);
    let alive = all.lock().open.len();
    assert_eq!(alive, HELD / (128_000 - SMALL));
    // Small ones are nobody's harm.
    let small = all.admit(ip("192.0.2.1")).unwrap();
    small.received(SMALL);
    assert_eq!(all.lock().open.len(), alive + 1);
    // A request that is complete is counted elsewhere.
    assert!(seats[1_999].working(true), "it is a large one");
    for seat in &seats {
        seat.working(true);
    }
    assert_eq!(all.lock().held, 0);
    drop((seats, small));
    let inner = all.lock();
    assert!(inner.large.is_empty() && inner.waiting.is_empty() && inner.open.is_empty());
}

/// Asserts that a change made just now gives the connection so long.
fn has(seat: &Seat, time: Option<Duration>, change: impl FnOnce()) {
    let before = Instant::now();
    change();
    let after = Instant::now();
    let deadline = seat.all.lock().open[&seat.id].deadline;
    assert_eq!(deadline.is_some(), time.is_some());
    if let (Some(deadline), Some(time)) = (deadline, time) {
        assert!(
            deadline >= before + time && deadline <= after + time,
            "{time:?}"
        );
    }
}

#[tokio::test]
async fn each_phase_has_its_time() {
    let all = connections(10, 0);
    let seat = all.admit(ip("192.0.2.1")).unwrap();
    let seconds = |n| Some(Duration::from_secs(n));
    has(&seat, seconds(10), || seat.received(1));
    let deadline = |seat: &Seat| seat.all.lock().open[&seat.id].deadline;
    let first = deadline(&seat);
    seat.received(1);
    assert_eq!(deadline(&seat), first, "one byte more gives no more time");
    // At work: as long as it takes.
    has(&seat, None, || assert!(!seat.working(true)));
    has(&seat, seconds(10), || seat.waits(seat.request()));
    has(&seat, None, || seat.came(seat.request()));
    has(&seat, None, || seat.asked(seat.request()));
    has(&seat, seconds(5), || seat.half_closed());
    has(&seat, seconds(4), || seat.answered());
    // What a body does after its answer is of no consequence for the next request.
    let old = seat.request() - 1;
    seat.asked(old);
    seat.waits(old);
    assert_eq!(seat.phase(), Phase::Idle);
    has(&seat, seconds(10), || seat.received(1));
    has(&seat, None, || seat.upgraded());
    has(&seat, None, || seat.answered());
}

#[tokio::test]
async fn an_idle_connection_first_lets_go_of_the_upstream() {
    let limits = Limits {
        keep_alive_timeout: Duration::from_millis(300),
        ..Limits::default()
    };
    let all = Connections::new(&limits, 10, Duration::from_millis(50));
    let seat = all.admit(ip("192.0.2.1")).unwrap();
    seat.working(true);
    seat.answered();
    assert_eq!(seat.due().await, Due::Rest);
    assert_eq!(seat.due().await, Due::Over);
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up() {
    let all = connections(10, 0);
    let seat = all.admit(ip("192.0.2.1")).unwrap();
    seat.working(true);
    seat.asked(seat.request());
    has(&seat, Some(STALL), || seat.stalled(true));
    has(&seat, None, || seat.stalled(false));
    // Its place may be needed meanwhile.
    seat.stalled(true);
    assert_eq!(all.lock().waiting.len(), 1);
}

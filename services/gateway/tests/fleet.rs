//! What a gateway promises when there are several workers behind it.

mod support;

use std::time::Duration;
use support::{Fake, Fleet, ask, options, soon, start_scorer, start_worker};
use tonic::{Code, Status};

const A: &str = "Belmon keeps the sunny bell near the library.";

/// Two workers and a gateway; the first worker is the one the gateway would choose for [`A`].
async fn pair() -> (Fleet, [Fake; 2]) {
    let (one, other) = (Fake::default(), Fake::default());
    let (first, second) =
        (start_worker(&one, "127.0.0.1:0").await, start_worker(&other, "127.0.0.1:0").await);
    let scorer = start_scorer(&one).await;
    let mut given = options(&first, Some(&scorer));
    given.workers.push(second.endpoint());
    let fleet = Fleet::with_options(given, one.clone()).await;
    fleet.generate(ask(&[A])).await.expect("an answer");
    let fakes = if one.state().sections.len() == 1 { [one, other] } else { [other, one] };
    // Both stay up for as long as the fleet does.
    (fleet.keeping([first, second, scorer]), fakes)
}

#[tokio::test]
async fn a_request_goes_to_another_worker_when_the_first_fails_before_its_first_token() {
    let (fleet, [first, second]) = pair().await;
    let asked = || first.state().asked.len() + second.state().asked.len();
    let before = asked();
    first.state().refuse = Some(Status::unavailable("on its way down"));
    let answer = fleet.generate(ask(&[A])).await.expect("an answer from the other worker");
    assert_eq!(answer.order, ["started", "token", "token", "done"], "the caller sees one answer");
    assert_eq!(second.state().sections.len(), 1);
    assert_eq!(second.state().importance.len(), 1, "with the importance sets of the first try");
    assert_eq!(asked(), before + 1, "which are asked for once, whatever becomes of the workers");
}

#[tokio::test]
async fn a_busy_worker_sends_its_requests_elsewhere() {
    let (fleet, [first, second]) = pair().await;
    let busy = cacheclip_rpc::status::exhausted("the worker's queue", Duration::from_millis(100));
    first.state().refuse = Some(busy.clone());
    fleet.generate(ask(&[A])).await.expect("an answer from the other worker");
    second.state().refuse = Some(busy);
    let refused = fleet.generate(ask(&[A])).await.expect_err("both are busy");
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
}

#[tokio::test]
async fn a_mistake_of_the_caller_is_not_tried_again() {
    let (fleet, [first, second]) = pair().await;
    first.state().refuse = Some(Status::invalid_argument("sampling: no"));
    let refused = fleet.generate(ask(&[A])).await.expect_err("refused");
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(second.state().sections.is_empty());
}

#[tokio::test]
async fn after_the_first_token_a_failure_is_the_callers() {
    let (fleet, [first, second]) = pair().await;
    first.state().cut = true;
    let refused = fleet.generate(ask(&[A])).await.expect_err("cut");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(second.state().sections.is_empty(), "tokens were already sent: nobody else may begin again");
}

#[tokio::test]
async fn requests_go_where_their_chunks_are() {
    let (fleet, [first, second]) = pair().await;
    let key = first.state().sections[0].chunks[0].key.clone();
    second.hold(&[key]);
    // Announcements come twice a second.
    let moved = async {
        let mut asked = 1;
        while second.state().sections.is_empty() {
            fleet.generate(ask(&[A])).await.expect("an answer");
            asked += 1;
            tokio::task::yield_now().await;
        }
        asked
    };
    let asked = soon(moved).await;
    assert_eq!(first.state().sections.len() + 1, asked, "and only from then on");
}

package reboot

import (
	"strings"
	"testing"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

func TestReport(t *testing.T) {
	a := dumpedEntry("a")
	ia := identity("a")
	older := checkpoint.NewID(ia, testTime.Add(-time.Hour))
	after := testTime.Add(time.Minute)
	committed := []store.Record{{ID: a.CheckpointID, State: store.Committed}}
	ev := func(typ event.Type, id checkpoint.ID, reason string) event.Event {
		return event.Event{Time: after, Type: typ, Identity: &ia, ContainerID: "ctr-next", CheckpointID: id, Reason: reason}
	}
	givenUp := ev(event.RestoreFail, a.CheckpointID, "the kubelet did not wait")
	givenUp.ReasonCode = "aborted"
	for name, tc := range map[string]struct {
		entry   Entry
		events  []event.Event
		records []store.Record
		want    State
		reason  string
	}{
		"waits":          {a, nil, committed, Pending, ""},
		"being restored": {a, nil, []store.Record{{ID: a.CheckpointID, State: store.Claimed}}, Pending, "being restored"},
		"restored":       {a, []event.Event{ev(event.Restored, a.CheckpointID, "")}, nil, Restored, ""},
		"restored, not yet consumed": {a, []event.Event{ev(event.Restored, a.CheckpointID, "")},
			[]store.Record{{ID: a.CheckpointID, State: store.Claimed}}, Restored, ""},
		"cold, set aside": {a, []event.Event{ev(event.ColdStart, a.CheckpointID, "cpu flag avx2"), ev(event.Quarantined, a.CheckpointID, "cpu")},
			[]store.Record{{ID: a.CheckpointID, State: store.Quarantined}}, Cold, "avx2"},
		"set aside, then cold": {a, []event.Event{ev(event.Quarantined, a.CheckpointID, "cpu"), ev(event.ColdStart, a.CheckpointID, "cpu flag avx2")},
			nil, Cold, "avx2"},
		"strict":                  {a, []event.Event{ev(event.RestoreFail, a.CheckpointID, "image")}, committed, Cold, "image"},
		"given up":                {a, []event.Event{givenUp}, committed, Pending, ""},
		"given up, then restored": {a, []event.Event{givenUp, ev(event.Restored, a.CheckpointID, "")}, nil, Restored, ""},
		"cold, then restored":     {a, []event.Event{ev(event.ColdStart, a.CheckpointID, "busy"), ev(event.Restored, a.CheckpointID, "")}, nil, Restored, ""},
		"restored, then removed":  {a, []event.Event{ev(event.Restored, a.CheckpointID, ""), ev(event.Removed, a.CheckpointID, "x")}, nil, Restored, ""},
		"not looked up":           {a, []event.Event{ev(event.ColdStart, "", "the store did not answer")}, committed, Cold, "did not answer"},
		"an older one is refused": {a, []event.Event{ev(event.ColdStart, older, "image")}, committed, Pending, ""},
		"before the preparation": {a, []event.Event{{Time: testTime.Add(-time.Minute), Type: event.ColdStart, Identity: &ia, ContainerID: "x", Reason: "r"}},
			committed, Pending, ""},
		"its own start":     {a, []event.Event{{Time: after, Type: event.ColdStart, Identity: &ia, ContainerID: a.ContainerID, Reason: "r"}}, committed, Pending, ""},
		"somebody else":     {a, []event.Event{{Time: after, Type: event.ColdStart, Identity: new(checkpoint.Identity), Reason: "r"}}, committed, Pending, ""},
		"never came back":   {a, []event.Event{ev(event.Removed, a.CheckpointID, "gc: older than 72h0m0s")}, nil, Expired, "older than 72h"},
		"removed by hand":   {a, []event.Event{ev(event.Removed, a.CheckpointID, "stasis rm: asked for")}, nil, Cold, "stasis rm"},
		"gone":              {a, nil, nil, Cold, "does not say why"},
		"set aside, no log": {a, nil, []store.Record{{ID: a.CheckpointID, State: store.Quarantined, Reason: "CRIU"}}, Cold, "CRIU"},
		"damaged":           {a, nil, []store.Record{{ID: a.CheckpointID, State: store.Corrupt}}, Cold, "damaged"},
		"not dumped":        {failedEntry("a", "io_uring"), nil, nil, NotDumped, "io_uring"},
		"not waited for, but restored": {failedEntry("a", "interrupted"),
			[]event.Event{ev(event.Restored, checkpoint.NewID(ia, testTime), "")}, nil, Restored, ""},
		"an event without anything": {a, []event.Event{{Time: after, Type: event.Dumped}}, committed, Pending, ""},
	} {
		t.Run(name, func(t *testing.T) {
			tr := NewTracker(testManifest(dumpedEntry("other"), tc.entry))
			for range 2 { // an event that is read twice does no harm
				for _, e := range tc.events {
					tr.Observe(e)
				}
			}
			r := tr.Report("boot-2", tc.records)
			got := r.Containers[1]
			if got.State != tc.want || !strings.Contains(got.Reason, tc.reason) || tc.reason == "" && got.Reason != "" {
				t.Errorf("%s %q, want %s %q", got.State, got.Reason, tc.want, tc.reason)
			}
			if !r.Rebooted || r.Kernel != "6.12.1" || r.Counts[tc.want] < 1 || len(r.Counts) != len(States) {
				t.Errorf("%+v", r)
			}
		})
	}
	if NewTracker(testManifest(a)).Report("boot-1", nil).Rebooted {
		t.Error("it is the same boot")
	}
}

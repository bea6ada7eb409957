package reboot

import (
	"strings"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// State is what has become of a container since the node came up again.
type State string

// The states. All but Pending are ends, though a container that started cold
// may yet be followed by one that is restored.
const (
	Pending   State = "pending"  // its checkpoint waits for it
	Restored  State = "restored" // it goes on
	Cold      State = "cold"     // it began anew, in spite of its checkpoint
	Expired   State = "expired"  // it did not come back while its checkpoint was kept
	NotDumped State = "failed"   // it was not dumped, and nothing was restored
)

// States are all states, in the order in which a container may have them.
var States = []State{Pending, Restored, Cold, Expired, NotDumped}

// Report is one container of the manifest, and its state. Reason, of the report
// itself, tells of the state; it is empty where there is nothing to tell.
type Report struct {
	Entry
	State  State  `json:"state"`
	Reason string `json:"stateReason,omitempty"`
}

// NodeReport is how the containers of a prepared node fare.
type NodeReport struct {
	// Rebooted: the manifest is of an earlier boot than this one. Otherwise the
	// node is prepared and has not gone down yet.
	Rebooted   bool          `json:"rebooted"`
	PreparedAt time.Time     `json:"preparedAt"`
	Kernel     string        `json:"kernel"` // release, before the reboot
	Counts     map[State]int `json:"counts"`
	Containers []Report      `json:"containers"`
}

// Tracker follows the containers of a manifest through the node's event log.
type Tracker struct {
	m          *Manifest
	byID       map[checkpoint.ID]int
	byIdentity map[checkpoint.Identity][]int
	told       []told // for each container, what the log says
}

type told struct {
	state  State
	reason string
}

// NewTracker follows m, which is not to be changed any more.
func NewTracker(m *Manifest) *Tracker {
	t := &Tracker{m: m, byID: map[checkpoint.ID]int{}, byIdentity: map[checkpoint.Identity][]int{}, told: make([]told, len(m.Containers))}
	for i, e := range m.Containers {
		if e.CheckpointID != "" {
			t.byID[e.CheckpointID] = i
		}
		t.byIdentity[e.Identity] = append(t.byIdentity[e.Identity], i)
	}
	return t
}

// Observe takes one event of the log. Events must come in the log's order; those
// of before the preparation, and those that it was told already, do no harm.
func (t *Tracker) Observe(e event.Event) {
	if i, ok := t.byID[e.CheckpointID]; ok {
		t.observe(i, e)
		return
	}
	// What concerns no checkpoint of the manifest, but a container of it: the
	// checkpoint could not be looked up, or one was restored that the
	// preparation did not wait for.
	if e.Identity == nil || e.Time.Before(t.m.PreparedAt) {
		return
	}
	for _, i := range t.byIdentity[*e.Identity] {
		c := &t.m.Containers[i]
		if c.ContainerID != e.ContainerID && (e.CheckpointID == "" || c.Result == Failed) {
			t.observe(i, e)
		}
	}
}

func (t *Tracker) observe(i int, e event.Event) {
	is := &t.told[i]
	if is.state == Restored {
		return // a checkpoint is used once
	}
	switch e.Type {
	case event.Restored:
		*is = told{Restored, ""}
	case event.ColdStart, event.RestoreFail:
		if e.GivenUp() {
			return
		}
		*is = told{Cold, e.Reason}
	case event.Quarantined, event.Removed:
		if is.state != "" {
			return // the cold start before it says why
		}
		*is = told{Cold, e.Reason}
		if reason, gc := strings.CutPrefix(e.Reason, "gc: "); gc {
			*is = told{Expired, reason}
		}
	}
}

// Report puts together what the log said so far with the records of the store.
// The records must be older than the last event that Observe was told: who is
// missing among them was restored or removed, and the log tells of that first.
func (t *Tracker) Report(bootID string, records []store.Record) *NodeReport {
	r := &NodeReport{Rebooted: t.m.BootID != bootID, PreparedAt: t.m.PreparedAt, Kernel: t.m.KernelRelease,
		Counts: map[State]int{}, Containers: make([]Report, 0, len(t.m.Containers))}
	for _, s := range States {
		r.Counts[s] = 0
	}
	there := map[checkpoint.ID]*store.Record{}
	for i := range records {
		if _, ok := t.byID[records[i].ID]; ok {
			there[records[i].ID] = &records[i]
		}
	}
	for i, e := range t.m.Containers {
		is := t.told[i]
		if is.state == "" {
			is = guess(&e, there[e.CheckpointID])
		}
		r.Counts[is.state]++
		r.Containers = append(r.Containers, Report{e, is.state, is.reason})
	}
	return r
}

// guess is the state of a container that the log says nothing of.
func guess(e *Entry, r *store.Record) told {
	switch {
	case e.Result == Failed:
		return told{NotDumped, e.Reason}
	case r == nil:
		return told{Cold, "its checkpoint is gone, and the event log does not say why"}
	case r.State == store.Quarantined:
		return told{Cold, "its checkpoint is set aside: " + r.Reason}
	case r.State == store.Corrupt:
		return told{Cold, "its checkpoint is damaged"}
	case r.State == store.Claimed:
		return told{Pending, "it is being restored"}
	}
	return told{Pending, ""}
}

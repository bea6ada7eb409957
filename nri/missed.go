package nri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/event"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
)

// missed is a container of an opted-in pod that was created while the plugin was
// not connected: an ordinary one, which began cold and is never dumped.
type missed struct {
	reboot.Missed
	sandboxID    string
	keepsRecords bool
	created      time.Time
}

// findMissed lists such containers among those that run, by ID.
func findMissed(pods []*api.PodSandbox, containers []*api.Container) map[string]missed {
	live, found := bySandbox(pods), map[string]missed{}
	for _, c := range containers {
		pod := live[c.GetPodSandboxId()]
		if _, decided := c.GetAnnotations()[checkpoint.InternalPolicy]; decided || pod == nil {
			continue
		}
		// What is wrong with a pod's annotations is told when a container is created.
		settings, err := checkpoint.ParseSettings(pod.GetAnnotations(), c.GetName())
		if err != nil || !settings.OptedIn() {
			continue
		}
		m := missed{sandboxID: pod.GetId(), keepsRecords: settings.KeepsRecords(), created: time.Unix(0, c.GetCreatedAt())}
		m.ContainerID, m.PodName, m.PodUID = c.GetId(), pod.GetName(), pod.GetUid()
		m.Identity = identityOf(pod, c.GetName(), settings)
		if m.Identity.Validate() == nil {
			found[m.ContainerID] = m
		}
	}
	return found
}

// lookForMissed takes the runtime's lists.
func (p *plugin) lookForMissed(pods []*api.PodSandbox, containers []*api.Container) {
	found := findMissed(pods, containers)
	p.mu.Lock()
	p.missed = found
	p.mu.Unlock()
	for _, m := range found {
		p.later(job{missed: &m})
	}
}

// allMissed are the missed containers that the runtime has not removed yet.
func (p *plugin) allMissed() []reboot.Missed {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]reboot.Missed, 0, len(p.missed))
	for _, m := range p.missed {
		all = append(all, m.Missed)
	}
	return all
}

// missedNow are the missed containers that still run, sorted.
func (s *server) missedNow() []reboot.Missed {
	return reboot.StillThere(s.config.ContainerdState, s.plugin.allMissed())
}

// maxSuperseded bounds the checkpoints of one identity that one container makes
// worthless.
const maxSuperseded = 100

// supersede says of a missed container that it began cold, and sets aside the
// checkpoints that it left unused: they would otherwise be restored the next
// time, over what the container has done since.
func (s *server) supersede(ctx context.Context, m missed) {
	e := event.Event{ReasonCode: "missed", Identity: &m.Identity, PodName: m.PodName, PodUID: m.PodUID,
		SandboxID: m.sandboxID, ContainerID: m.ContainerID}
	told := false
	for range maxSuperseded {
		if !m.keepsRecords {
			break // what it may have of an earlier policy is none of its business
		}
		id, err := s.superseded(ctx, m)
		if err != nil {
			log.G(ctx).WithError(err).WithField("container_id", m.ContainerID).Error("older checkpoints of a container that began cold are left")
			break
		}
		if id == "" {
			break
		}
		e.CheckpointID = id
		// First, so that it is never gone without a reason.
		e.Type, e.Reason = event.ColdStart, "created while stasisd was not connected"
		s.tell(ctx, e)
		told = true
		e.Type, e.Reason = event.Quarantined, fmt.Sprintf("superseded: container %s began cold while stasisd was not connected", m.ContainerID)
		if err := s.store.Quarantine(ctx, id, e.Reason, nil); err != nil {
			log.G(ctx).WithError(err).WithField("checkpoint_id", id).Error("superseded checkpoint not set aside")
			return // the same one would be found again
		}
		s.tell(ctx, e)
	}
	if told {
		return
	}
	e.Type, e.CheckpointID = event.Ignored, ""
	e.Reason = fmt.Sprintf("container %s was created while stasisd was not connected: it is not dumped until it is created again", m.Identity.Container)
	for _, e := range s.plugin.pods.firstTold(m.sandboxID, []event.Event{e}) {
		s.tell(ctx, e)
	}
}

// superseded is the newest checkpoint that is older than the container, empty if
// there is none.
func (s *server) superseded(ctx context.Context, m missed) (checkpoint.ID, error) {
	latest, err := s.store.Latest(ctx, m.Identity)
	var corrupt *store.CorruptError
	switch {
	case errors.As(err, &corrupt):
		return corrupt.ID, nil
	case errors.Is(err, checkpoint.ErrNotFound), errors.Is(err, checkpoint.ErrBusy):
		return "", nil // busy: another container goes on from it just now
	case err != nil:
		return "", err
	case latest.CreatedAt.Before(m.created):
		return latest.ID, nil
	}
	return "", nil // of a successor
}

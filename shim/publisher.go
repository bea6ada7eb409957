package shim

import (
	"context"
	"sync"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/shim"
)

// publisher stands between the inner service and containerd. When a failed
// restore is replaced by a cold start the inner service deletes one object and
// makes another; containerd must not hear of the deletion, nor of the exit where
// the one had run, for to it the task is the same.
type publisher struct {
	shim.Publisher

	mu    sync.Mutex
	muted map[string]int        // container id -> TaskDelete events still to be dropped, guarded by mu
	exits map[initExit]struct{} // TaskExit events still to be dropped, guarded by mu
}

// initExit is the exit of a container's first process.
type initExit struct {
	id  string
	pid uint32
}

func (p *publisher) muteDelete(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.muted == nil {
		p.muted = make(map[string]int)
	}
	p.muted[id]++
}

// muteExit drops the exit of a container whose first process has, or had, the
// pid. One that was published already cannot be taken back; it is Wait by which
// containerd's CRI plugin learns of an exit.
func (p *publisher) muteExit(id string, pid uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exits == nil {
		p.exits = make(map[initExit]struct{})
	}
	p.exits[initExit{id, pid}] = struct{}{}
}

func (p *publisher) dropExit(e *apievents.TaskExit) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := initExit{e.ContainerID, e.Pid}
	_, ok := p.exits[key]
	delete(p.exits, key)
	return ok
}

func (p *publisher) Publish(ctx context.Context, topic string, e events.Event) error {
	if d, ok := e.(*apievents.TaskDelete); ok && p.drop(d.ContainerID) {
		return nil
	}
	if x, ok := e.(*apievents.TaskExit); ok && x.ID == x.ContainerID && p.dropExit(x) {
		return nil
	}
	return p.Publisher.Publish(ctx, topic, e)
}

func (p *publisher) drop(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.muted[id]
	switch n {
	case 0:
		return false
	case 1:
		delete(p.muted, id)
	default:
		p.muted[id] = n - 1
	}
	return true
}
